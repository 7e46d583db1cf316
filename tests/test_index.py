"The index under liars, at rest, and at any number of peers; in memory, under a clock that skips the waiting."
import random

import base58, pytest, trio
from hypothesis import given, settings, strategies as st
from memory import simulate, start

from lah_nb.network import DHT, MemoryHub, Record, Records, WireError, nearest, new_identity, peer_id_of
from lah_nb.network.contacts import HINTS
from lah_nb.network.records import HOSTS, WITNESSES


def memory_of(dht):
    "Entries in all that it remembers of others"
    contacts = dht.contacts
    return sum(map(len, (contacts.addrs, contacts.heard, contacts.hints, contacts.standing, contacts.shunned, contacts.lost)))


def invent(hub, dht, rng):
    "From now on this peer names 20 peers that nobody can reach, new ones for every key, the nearest of 100"
    (nobody := hub.peer()).silent = True
    pool = [base58.b58encode(bytes.fromhex('002408011220') + rng.randbytes(32)).decode() for _ in range(4000)]
    hub.peers.update(dict.fromkeys(pool, nobody))
    async def lie(request):
        near, addrs = [], {}
        for key in request.meta['keys']:
            near.append(nearest(key, rng.sample(pool, 100), 20))
            addrs.update({peer: [f'/ip4/192.0.2.1/tcp/{rng.randrange(1, 65536)}'] for peer in near[-1]})
        return {'near': near, 'addrs': addrs, 'found': [[] for _ in near]}, ()
    dht.network.serve('dht.find', lie)


@pytest.mark.parametrize('liars', [1, 3])
def test_who_invents_peers_slows_nobody_down(liars):
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, rng = await start(hub, 16, nursery), random.Random(0)
            honest = dhts[liars:]
            for i, dht in enumerate(honest): await dht.announce({(f'experts/ffn.{i}', '1'): b'here'})
            keys = [f'experts/ffn.{i}' for i in range(len(honest))]
            async def seconds():
                spent = []
                for dht in honest:
                    began = trio.current_time()
                    found = await dht.get(rng.sample(keys, 4), max_age=0)
                    spent.append(trio.current_time() - began)
                    assert all(len(records) == 1 for records in found.values())
                return spent
            calm = await seconds()
            for liar in dhts[:liars]: invent(hub, liar, rng)
            first = await seconds()
            for _ in range(3):
                await trio.sleep(5)
                later = await seconds()
            remembered = max(map(memory_of, honest))
            await trio.sleep(60)
            last = await seconds()
            assert max(first) <= 2 * max(calm) and max(later + last) <= 2 * max(calm)
            assert all(len(dht.peers) >= 16 - liars - 1 for dht in honest)
            # hints have a bound, and what is older than a minute is gone: flat, not growing with the attack
            assert max(remembered, *map(memory_of, honest)) <= HINTS + 512
            nursery.cancel_scope.cancel()
    simulate(main)


AUTHORS = [new_identity(bytes([i]) * 32) for i in range(12)]
NAMES = [peer_id_of(author) for author in AUTHORS]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(
    st.integers(0, 11), st.integers(0, 2), st.sampled_from(['announce', 'renew', 'withdraw', 'die']), st.floats(0.1, 4.)), max_size=60))
def test_a_subkey_with_a_living_author_is_found_and_its_witnesses_are_few(events):
    "Whoever comes, goes and dies: a holder to which the living return in time knows each subkey that lives"
    table, living, now, seq = Records(), {}, 0., 0
    def offer(author, subkey, value=b''):
        nonlocal seq
        seq = max(seq + 1, int(1000 * now))
        table.put(Record('experts/ffn', str(subkey), NAMES[author], value, seq, 30.), 30., now)
    for author, subkey, what, pause in events:
        now += pause
        for slot, due in list(living.items()):
            if due <= now:
                offer(*slot)
                living[slot] = now + 10.
        if what in ('announce', 'renew'):
            offer(author, subkey)
            living[author, subkey] = now + 10.
        elif what == 'withdraw' and living.pop((author, subkey), None): offer(author, subkey, None)
        elif what == 'die': living.pop((author, subkey), None)
        found = [record for record, _ in table.get('experts/ffn', now) if record.value is not None]
        for i in range(3): assert sum(record.subkey == str(i) for record in found) <= WITNESSES
        for author, subkey in living:
            # at most until the others that live have come again
            if not any(record.subkey == str(subkey) for record in found):
                assert now - max(due - 10. for (_, s), due in living.items() if s == subkey) <= 10.
    for slot in living: offer(*slot)
    found = {record.subkey for record, _ in table.get('experts/ffn', now) if record.value is not None}
    assert {str(subkey) for _, subkey in living} <= found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 11), st.integers(0, 11), st.floats(0.1, 29.), st.booleans())
def test_what_is_forged_expired_or_played_back_is_never_kept(author, forger, later, withdrawn):
    sign = AUTHORS[author].private_key.sign
    record = Record('experts/ffn', '1', NAMES[author], b'', 1000, 30.)
    if forger != author:
        with pytest.raises(WireError): Record.from_list(record.signed(AUTHORS[forger].private_key.sign).to_list(30.))
    table = Records()
    assert table.put(*Record.from_list(record.signed(sign).to_list(30.)), 0.)
    if withdrawn:
        assert table.put(Record('experts/ffn', '1', NAMES[author], None, 1000 + int(1000 * later), 30.).signed(sign), 30., later)
        assert not table.put(record.signed(sign), 30., later)
        assert [held.value for held, _ in table.get('experts/ffn', later)] == [None]
    table.sweep(later + 31.)
    assert not table.put(record.signed(sign), 30., later + 31.) and not table.get('experts/ffn', later + 31.)


def test_of_many_hosts_of_one_expert_some_are_kept():
    table = Records()
    for i in range(40): table.put(Record('experts/ffn.3', '1', f'{NAMES[i % 12][:-2]}{i:02}'.replace('0', '1'), b'at %d' % i, 1000, 30.), 30., 0.)
    assert len(table.get('experts/ffn.3', 0.)) == HOSTS


@pytest.mark.slow
@pytest.mark.parametrize('dead', [0., 0.3])
def test_rows_are_found_by_few_witnesses_also_after_silent_deaths(dead):
    "48 hosts of 6 rows: four witnesses a row at each holder, and all rows right through, until only the living are left"
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, rng = await start(hub, 48, nursery), random.Random(1)
            for i, dht in enumerate(dhts): await dht.announce({('experts/ffn', str(i % 6)): b'', (f'experts/ffn.{i % 6}', str(i)): b'here'})
            await trio.sleep(25)
            for dht in rng.sample(dhts[6:], int(dead * len(dhts))): dht.network.silent = True
            reader = next(dht for dht in reversed(dhts) if not dht.network.silent)
            for _ in range(6):
                await trio.sleep(7)
                found = (await reader.get(['experts/ffn'], max_age=0))['experts/ffn']
                assert {record.subkey for record in found} == set('012345')
            for dht in dhts:
                kept = [record.subkey for record, _ in dht.records.get('experts/ffn', trio.current_time()) if record.value is not None]
                assert all(kept.count(row) <= WITNESSES for row in '012345')
            living = [dht for dht in dhts if not dht.network.silent]
            calls = sum(dht.network.calls for dht in living)
            await trio.sleep(60)
            assert (sum(dht.network.calls for dht in living) - calls) / 60 / len(living) < 3.5
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_witness_that_leaves_hides_nothing():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 24, nursery)
            for dht in dhts[:16]: await dht.announce({('experts/ffn', '3'): b''})
            for dht in dhts[:16]:
                await dht.withdraw()
                await trio.sleep(11)
                if dht is not dhts[15]: assert (await dhts[20].get(['experts/ffn'], max_age=0))['experts/ffn']
            assert not (await dhts[20].get(['experts/ffn'], max_age=0))['experts/ffn']
            nursery.cancel_scope.cancel()
    simulate(main)
