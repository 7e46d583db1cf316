"Any tensor survives the wire; any bytes are survived by the wire."
import struct

import msgpack, pytest, torch
from hypothesis import given, settings, strategies as st

from lah_nb.network import Assembler, Spec, WireError, chunks, decode, encode, pack, read_header, spec, tensors, unpack, wire

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(list(tensors.DTYPES.values()))
STEPS = {'float16': 2**-10, 'bfloat16': 2**-7}


def tensor(shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=g) * 10
    return t > 0 if dtype is torch.bool else t.abs().to(dtype) if dtype is torch.uint8 else t.to(dtype)


@given(shapes, dtypes, st.sampled_from(spec.CODECS), st.integers(0, 2**20))
@settings(deadline=None, max_examples=300)
def test_round_trip(shape, dtype, codec, seed):
    t = tensor(shape, dtype, seed)
    spec, data = encode(t, codec)
    assert len(data) == spec.nbytes
    back = decode(Spec.from_list(msgpack.unpackb(msgpack.packb(spec.to_list()))), memoryview(bytearray(data)))
    assert back.shape == t.shape and back.dtype == t.dtype
    if spec.codec == 'none': assert torch.equal(back, t)
    elif spec.codec == 'blockwise8': assert t.numel() == 0 or (back.float() - t.float()).abs().max() <= t.abs().max().float() * (1 / 254 + 2**-7 * (dtype is not torch.float32)) + 1e-6
    else: torch.testing.assert_close(back.float(), t.float(), rtol=STEPS[spec.codec] + STEPS.get(str(dtype)[6:], 0), atol=1e-6)


def test_a_single_number_travels_at_whatever_stride_it_lies():
    t = torch.arange(4, dtype=torch.int32)[2:3].as_strided((1,), (0,), 2)
    assert t.stride() == (0,) and bytes(encode(t, 'none')[1]) == b'\x02\x00\x00\x00'


@given(st.lists(st.tuples(shapes, dtypes), max_size=4), st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(0, 2**20))
@settings(deadline=None, max_examples=100)
def test_messages_cut_anywhere_arrive_whole(kinds, cuts, seed):
    tensors = tuple(tensor(shape, dtype, seed + i) for i, (shape, dtype) in enumerate(kinds))
    streams = [b''.join(bytes(x) for c in chunks(wire.REQUEST, i, pack({'i': i}, tensors)) for x in c) for i in range(2)]
    data, assembler, got, at, i = b''.join(streams), Assembler(), [], 0, 0
    while at < len(data):
        got += list(assembler.feed(data[at:at + cuts[i % len(cuts)]]))
        at, i = at + cuts[i % len(cuts)], i + 1
    assembler.close()
    assert [id for _, id, _, _ in got] == [0, 1]
    for _, i, header, body in got:
        meta, back = unpack(header, body)
        assert meta == {'i': i} and all(torch.equal(a, b) for a, b in zip(back, tensors))


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_garbage_is_refused_or_waits_for_more(data):
    try: list(Assembler().feed(data))
    except WireError: pass


@given(st.integers(0, 2**20), st.integers(0, 10**6), st.integers(1, 255))
@settings(deadline=None, max_examples=300)
def test_one_flipped_byte_never_breaks_anything(seed, where, mask):
    data = bytearray(b''.join(bytes(x) for c in chunks(wire.REQUEST, 1, pack({'uid': 'ffn.1'}, (tensor((3, 4), torch.float32, seed), tensor((5,), torch.bool, seed)))) for x in c))
    data[where % len(data)] ^= mask
    try:
        for kind, id, header, body in Assembler().feed(bytes(data)):
            if header is not None: unpack(header, body)
    except WireError: pass


@given(st.recursive(st.none() | st.booleans() | st.integers(-2**31, 2**63 - 1) | st.floats() | st.text(max_size=5), lambda c: st.lists(c, max_size=5) | st.dictionaries(st.text(max_size=3), c, max_size=3), max_leaves=20))
@settings(max_examples=300)
def test_any_msgpack_is_a_header_or_refused(what):
    try: read_header(msgpack.packb(what), 0)
    except WireError: pass


@pytest.mark.parametrize('raw, why', [
    (['float32', [2**39, 2**39], 'none', 4], 'bytes'), (['float32', [-1], 'none', 0], 'impossible shape'), (['float32', [1] * 9, 'none', 4], 'impossible shape'), (['float32', [True], 'none', 4], 'impossible shape'),
    (['object', [1], 'none', 8], 'not the description'), (['float32', [1], 'pickle', 4], 'not the description'), (['int64', [1], 'float16', 2], 'floating-point'), (['float32', [1 << 28], 'none', 4 << 28], 'limit')])
def test_specs_that_lie(raw, why):
    with pytest.raises(WireError, match=why): Spec.from_list(raw)


def test_no_memory_before_the_header_is_believed():
    "A message that announces 200 MB costs its receiver what has arrived, not what was announced"
    import tracemalloc
    tracemalloc.start()
    header = msgpack.packb([{}, [['uint8', [200_000_000], 'none', 200_000_000]]])
    assembler = Assembler()
    assert list(assembler.feed(struct.pack('!BQI', wire.REQUEST, 1, 12 + len(header)) + struct.pack('!IQ', len(header), 200_000_000) + header)) == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_announcements_add_up():
    "Many half-way messages on one stream cannot announce more than the limit together"
    assembler, header = Assembler(), msgpack.packb([{}, [['uint8', [200 << 20], 'none', 200 << 20]]])
    with pytest.raises(WireError, match='half-way'):
        for i in range(5): list(assembler.feed(struct.pack('!BQI', wire.REQUEST, i, 12 + len(header)) + struct.pack('!IQ', len(header), 200 << 20) + header))
