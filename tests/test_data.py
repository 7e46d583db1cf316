"Downloads against a real local server, damaged files, and the arithmetic of batches"
import functools, gzip, hashlib, http.server, os, threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lah_nb.training import DataError, TextData, data, text_data
from lah_nb.training.data import find_file, read_idx
from lah_nb import load_digits, load_mnist, load_text, load_wikitext2
from lah_nb.errors import LahError


@pytest.fixture
def site(tmp_path):
    "A folder served over http, and its address"
    (folder := tmp_path / 'site').mkdir()
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown(), server.server_close(), thread.join()


@pytest.fixture
def small_file(monkeypatch):
    content = b'words ' * 50_000
    monkeypatch.setitem(data.FILES, 'wikitext-2/wiki.test.tokens', (hashlib.sha256(content).hexdigest(), len(content)))
    return content


def test_download_tries_the_addresses_in_turn(site, small_file, tmp_path):
    folder, base = site
    (folder / 'short').write_bytes(small_file[:-1])
    (folder / 'long').write_bytes(small_file + b'!')
    (folder / 'other').write_bytes(small_file[:-1] + b'!')
    (folder / 'good').write_bytes(small_file)
    bad = [f'{base}/{name}' for name in ('missing', 'short', 'long', 'other')]
    with pytest.raises(DataError) as e: find_file('wikitext-2/wiki.test.tokens', tmp_path / 'd', urls=bad, progress=False)
    assert isinstance(e.value, LahError) and '404' in str(e.value) and 'sha256' in str(e.value) and str(tmp_path / 'd/wikitext-2/wiki.train.tokens') in str(e.value)
    assert not any(p.is_file() for p in (tmp_path / 'd').rglob('*'))
    path = find_file('wikitext-2/wiki.test.tokens', tmp_path / 'd', urls=[*bad, f'{base}/good'], progress=False)
    assert path.read_bytes() == small_file and [p.name for p in path.parent.iterdir()] == ['wiki.test.tokens']
    assert find_file('wikitext-2/wiki.test.tokens', tmp_path / 'd', urls=[]) == path


def test_a_folder_that_cannot_be_written(site, small_file, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (site[0] / 'good').write_bytes(small_file)
    with pytest.raises(DataError, match='Put these files in place'): find_file('wikitext-2/wiki.test.tokens', tmp_path / 'file', urls=[f'{site[1]}/good'], progress=False)


def test_lah_data_and_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('LAH_DATA', str(tmp_path))
    assert data.data_folder() == tmp_path
    monkeypatch.delenv('LAH_DATA')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    assert data.data_folder().name == 'lah_nb'


@given(st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_array_or_an_error(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / 'fuzz.gz'
    for content in (raw, gzip.compress(raw), gzip.compress(b'\0\0\x08' + raw)):
        path.write_bytes(content)
        try: assert read_idx(path).ndim in (1, 2, 3)
        except DataError: pass


def test_a_small_file_that_claims_much_takes_no_memory(tmp_path):
    path = tmp_path / 'bomb.gz'
    path.write_bytes(gzip.compress(b'\0\0\x08\x01\x0f\xff\xff\xff' + bytes(1000)))
    with pytest.raises(DataError, match='does not hold'): read_idx(path)
    path.write_bytes(gzip.compress(b'\0\0\x08\x01\x00\x00\x00\x02' + bytes(10_000_000)))
    with pytest.raises(DataError, match='does not hold'): read_idx(path)


def test_files_that_do_not_belong_together(tmp_path):
    (tmp_path / 'mnist').mkdir()
    images = gzip.compress(b'\0\0\x08\x03' + b'\0\0\0\2\0\0\0\1\0\0\0\1' + b'ab')
    labels = gzip.compress(b'\0\0\x08\x01' + b'\0\0\0\3' + b'\1\2\3')
    for which in 'train', 't10k':
        (tmp_path / f'mnist/{which}-images-idx3-ubyte.gz').write_bytes(images)
        (tmp_path / f'mnist/{which}-labels-idx1-ubyte.gz').write_bytes(labels)
    with pytest.raises(DataError, match='do not belong together'): load_mnist(tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / 'wikitext-2').mkdir()
    for part in 'train', 'valid', 'test': (tmp_path / f'wikitext-2/wiki.{part}.tokens').write_bytes(b'\xff\xfe\xfd')
    with pytest.raises(DataError, match='damaged'): load_wikitext2(tmp_path)


def test_digits_are_split_evenly_and_always_alike():
    a, b = load_digits(), load_digits()
    assert a.x_train.equal(b.x_train) and a.batch(7, 16)[0].equal(b.batch(7, 16)[0])
    assert not a.batch(7, 16, seed=1)[0].equal(a.batch(7, 16)[0])
    seen = torch.cat([a.batch(i, 64)[0] for i in range(-(-2 * len(a) // 64))])[:2 * len(a)]
    for epoch in seen.split(len(a)): assert torch.equal(epoch.sum(1).sort().values, a.x_train.sum(1).sort().values)


@given(n=st.integers(2, 60), length=st.integers(1, 20), context=st.integers(0, 19), size=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_test_token_is_scored_once(n, length, context, size):
    t = TextData(torch.arange(n), torch.arange(n), torch.arange(n), tuple(map(str, range(n))), 'numbers', 8)
    if context >= length: return
    batches = t.tests(size, length=length, context=context)
    scored = torch.cat([y[y >= 0] for _, y in batches])
    assert scored.tolist() == list(range(1, n))
    for x, y in batches: assert x.shape == y.shape and len(x) <= size and bool(((y == x + 1) | (y == -1)).all())


@given(n=st.integers(20, 300), length=st.integers(1, 9), size=st.integers(1, 5), i=st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_text_batches_are_runs_of_the_text(n, length, size, i):
    t = TextData(torch.arange(n), torch.arange(n), torch.arange(n), tuple(map(str, range(n))), 'numbers', length)
    x, y = t.batch(i, size)
    assert x.shape == y.shape == (size, length) and y.equal(x + 1) and bool((x.diff(dim=1) == 1).all())


def test_an_epoch_of_text_goes_through_it_once():
    t = text_data([str(i) for i in range(1000)], [], [], 'numbers', length=10)
    for epoch in range(3):
        n = t.batches_per_epoch(7)
        seen = torch.cat([t.batch(epoch * n + i, 7)[0].flatten() for i in range(n)])
        assert len(seen) == len(seen.unique()) and len(seen) > 900


def test_unknown_words_and_tiny_texts():
    t = load_text(length=16)
    assert t.vocab.index('<unk>') < 20 and set(t.vocab) >= {'<eos>', 'the'}
    counts = t.train.bincount(minlength=len(t.vocab))
    assert bool((counts.diff() <= 0).all())
    tiny = text_data(list('abc'), [], list('ab'), 'tiny', length=1)
    assert tiny.batch(5, 2)[0].shape == (2, 1)


real = Path(os.environ.get('LAH_DATA', '/nowhere'))

@pytest.mark.skipif(not (real / 'mnist').is_dir(), reason='LAH_DATA has no mnist')
def test_real_mnist():
    mnist = load_mnist(real)
    assert (len(mnist.y_train), len(mnist.y_test), mnist.features, mnist.classes) == (60_000, 10_000, 784, 10)
    assert mnist.y_train[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]


@pytest.mark.skipif(not (real / 'wikitext-2').is_dir(), reason='LAH_DATA has no wikitext-2')
def test_real_wikitext2():
    wiki = load_wikitext2(real)
    assert (len(wiki.train), len(wiki.valid), len(wiki.test), len(wiki.vocab)) == (2_088_628, 217_646, 245_569, 33_278)
    assert wiki.vocab[:3] == ('the', ',', '.')
