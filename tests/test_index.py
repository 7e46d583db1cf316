"The index under liars, at rest, and at any number of peers; in memory, under a clock that skips the waiting."
import random
from dataclasses import replace

import base58, pytest, trio
from hypothesis import given, settings, strategies as st
from memory import simulate, start

from lah_nb.network import DHT, MemoryHub, Record, Records, WireError, nearest, new_identity, peer_id_of, records
from lah_nb.network.contacts import HINTS
from lah_nb.network.dht import COPIES, NEAR_FOR, STORED_FOR, TTL, WIDTH, life_of
from lah_nb.network.records import HOSTS, MAX_TTL, WITNESSES, Lookup, authentic
from lah_nb.simulation.world import World, in_virtual_time


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
            assert max(first + later + last) <= 2 * max(calm) + 1e-6
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


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_reader_that_is_through_knows_every_row_if_two_of_eight_holders_know_less(data):
    "Two of the nearest are new, or lie; some are dead; answers come in any order"
    near, rows = nearest('experts/ffn', NAMES, 8), {'1', '2', '3'}
    told = dict.fromkeys(near, rows)
    for peer in data.draw(st.lists(st.sampled_from(near), max_size=2)): told[peer] = data.draw(st.sets(st.sampled_from('1234')))
    dead = data.draw(st.sets(st.sampled_from(near), max_size=4))
    look = Lookup('experts/ffn', near)
    look.wanted()
    known = set()
    for peer in data.draw(st.permutations(near)):
        if peer in dead: (look.slow if data.draw(st.booleans()) else look.failed)(peer)
        else:
            look.answered(peer, near, told[peer])
            known |= told[peer]
        if look.heard: assert rows <= known
    assert look.heard or look.count('slow')


def test_what_is_looked_up_ahead_comes_with_the_rest_and_nobody_waits_for_it():
    "The holders of one of the keys are silent: who asks for another is answered in a few round trips"
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 24, nursery)
            for i, dht in enumerate(dhts): await dht.announce({('experts/ffn', str(i % 2)): b'', (f'experts/ffn.{i % 2}', str(i)): b'here'})
            holders = nearest('experts/ffn.7', [dht.peer_id for dht in dhts], 4)
            for dht in dhts[1:]: dht.network.silent = dht.peer_id in holders
            reader = DHT(hub.peer(), clock=trio.current_time)
            await nursery.start(reader.run)
            await reader.join({dhts[0].peer_id: dhts[0].network.addrs})
            while reader.new_here: await trio.sleep(0.1)  # or others would read for it
            begun = trio.current_time()
            found = await reader.get(['experts/ffn'], ahead=['experts/ffn.0', 'experts/ffn.1', 'experts/ffn.7'])
            assert {record.subkey for record in found['experts/ffn']} == {'0', '1'} and found.keys() == {'experts/ffn'}
            assert trio.current_time() - begun < 0.2
            await reader.get(['experts/ffn.7'])
            assert trio.current_time() - begun >= 0.2
            calls = reader.network.calls
            found = await reader.get(['experts/ffn.0', 'experts/ffn.1'])
            assert reader.network.calls == calls and all(found.values())
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_holder_with_enough_others_nearer_says_so_and_its_author_looks_again():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, key = await start(hub, 24, nursery), 'experts/ffn'
            author, *others = dhts
            order = nearest(key, [dht.peer_id for dht in others], 23)
            for peer, remembered in (order[0], STORED_FOR), (order[-1], NEAR_FOR):
                author._near[key] = trio.current_time() + STORED_FOR, tuple(order[:8])
                assert await author._put_on(peer, author._sign({(key, '1'): b''}), {}) is not None
                left = author._near[key][0] - trio.current_time()
                assert remembered / 2 - 1 <= left <= remembered
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_holder_that_fails_is_done_without_until_there_are_too_few_for_all_copies():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, key = await start(hub, 24, nursery), 'experts/ffn'
            author, *others = dhts
            await author.announce({(key, '1'): b''})
            await trio.sleep(15.)  # it is renewed, once all have met
            holders = author._known_holders(key)
            assert len(holders) == WIDTH
            for fails in range(1, WIDTH - COPIES + 2):
                author.contacts.failed(holders[-fails])
                left = author._known_holders(key)
                # who was merely late and is back is among the nearest again, and found by the next look-up
                assert left == (holders[:-fails] if WIDTH - fails >= COPIES else [])
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('hosts', [40, 160])
def test_a_row_sees_as_few_calls_however_many_host_it(hosts):
    "Those that are not needed rest, all the longer the more they are, until all together come as seldom as they should"
    key = 'experts/ffn'
    async def main():
        world = World(hosts)
        holders = [DHT(world.peer(), clock=trio.current_time) for _ in range(WIDTH)]
        authors = [DHT(world.peer(dialled=False), clock=trio.current_time) for _ in range(hosts)]
        ids = nearest(key, [dht.peer_id for dht in holders], WIDTH)
        async def live(dht):
            dht._near[key] = 1e9, tuple(ids)
            await trio.sleep(world.random.uniform(0., 10.))
            await nursery.start(dht.run)
            await dht.announce({(key, '3'): b''})
        async with trio.open_nursery() as nursery:
            for dht in authors: nursery.start_soon(live, dht)
            await trio.sleep(400.)
            before = [dht.network.received for dht in holders]
            await trio.sleep(200.)
            received = max(dht.network.received - was for dht, was in zip(holders, before))
            assert WITNESSES < received / 20 <= WITNESSES + 6  # in a period
            # all witnesses die at once: others take their places in time
            for dht in authors:
                dht.network.dead = any(dht.peer_id in entries for entries in holders[0].records._keys[key].values())
            for _ in range(8):
                await trio.sleep(5.)
                assert any(record.value is not None for dht in holders for record, _ in dht.records.get(key, trio.current_time()))
            nursery.cancel_scope.cancel()
    in_virtual_time(main)


def test_what_is_said_in_a_part_of_the_list_of_peers_lives_longer_than_an_expert():
    assert [life_of(key, TTL) for key in ('experts/ffn.3', 'swarm/peers', 'swarm/peers/3/5')] == [TTL, TTL, 3 * TTL]
    assert life_of('swarm/peers/3/5', MAX_TTL) == MAX_TTL
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, slots = await start(hub, 6, nursery), [('swarm/peers/3/5', 'a'), ('experts/ffn', '1')]
            await dhts[1].announce(dict.fromkeys(slots, b'here'))
            async def lives():
                found = await dhts[2].get([key for key, _ in slots], max_age=0)
                return [bool(found[key]) for key, _ in slots]
            await trio.sleep(100.)
            assert await lives() == [True, True]  # renewed in time, the one more rarely than the other
            dhts[1].network.silent = True
            await trio.sleep(35.)
            assert await lives() == [True, False]
            await trio.sleep(60.)
            assert await lives() == [False, False]
            nursery.cancel_scope.cancel()
    simulate(main)


def test_rows_are_fetched_ahead_when_a_batch_will_want_most_of_them():
    from lah_nb.mixture.roster import looks_ahead
    assert looks_ahead(64, 4, (16, 16), 0) and looks_ahead(4, 4, (16, 16), 0)
    few_rows, last_level, no_next, too_wide = (1, 4, (16, 16), 0), (64, 4, (16, 16), 1), (64, 4, (16,), 0), (64, 4, (128, 16), 0)
    assert not any(looks_ahead(*case) for case in (few_rows, last_level, no_next, too_wide))


async def settled(hub, n, nursery):
    "Peers that have had time to meet"
    dhts = await start(hub, n, nursery)
    await trio.sleep(60.)
    return dhts


def counted(dht):
    "The methods that this peer calls from now on"
    called, call = [], dht.network.call
    async def counting(peer, method, *args, **options):
        called.append(method)
        return await call(peer, method, *args, **options)
    dht.network.call = counting
    return called


def holders_of(key, dhts):
    now = trio.current_time()
    return {dht.peer_id for dht in dhts if dht.records.get(key, now)}


def test_where_all_know_all_a_record_goes_straight_to_its_holders_and_is_read_with_few_questions():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts = await settled(hub, 30, nursery)
            author, reader, rows = dhts[4], dhts[17], [f'experts/ffn.{i}' for i in range(16)]
            assert author.contacts.nearly_all and reader.contacts.nearly_all
            called = counted(author)
            await author.announce({(row, '3'): b'here' for row in rows})
            assert set(called) == {'dht.store'} and len(called) < 30
            for row in rows: assert holders_of(row, dhts) == set(nearest(row, [dht.peer_id for dht in dhts], COPIES))
            called = counted(reader)
            found = await reader.get([*rows, 'experts/none'])
            assert all(len(found[row]) == 1 for row in rows) and found['experts/none'] == []
            assert len(called) < 45  # a look-up of each asks all thirty, again and again
            nursery.cancel_scope.cancel()
    simulate(main)


def test_who_guesses_the_holders_of_a_key_wrongly_is_told_and_looks_for_them():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, key = await settled(hub, 30, nursery), 'experts/ffn'
            true = nearest(key, [dht.peer_id for dht in dhts], COPIES)
            author = next(dht for dht in dhts if dht.peer_id not in true)
            for peer in true[:3]: author.contacts._leave_table(peer)
            assert author.contacts.nearly_all
            called = counted(author)
            await author.announce({(key, '1'): b'here'})
            assert called[0] == 'dht.store' and 'dht.find' in called
            assert set(true) <= holders_of(key, dhts)
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_holder_that_does_not_answer_is_not_taken_for_one():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, key = await settled(hub, 30, nursery), 'experts/ffn'
            order = nearest(key, [dht.peer_id for dht in dhts], 8)
            author = next(dht for dht in dhts if dht.peer_id not in order)
            next(dht for dht in dhts if dht.peer_id == order[2]).network.silent = True
            began = trio.current_time()
            copies = await author.announce({(key, '1'): b'here'})
            assert copies[key] == COPIES and trio.current_time() - began < 4
            assert len(holders_of(key, dhts)) >= COPIES
            nursery.cancel_scope.cancel()
    simulate(main)


def test_what_is_remembered_of_signatures_is_bounded(monkeypatch):
    monkeypatch.setattr(records, 'MOST_VERIFIED', 8)
    signed = [Record('experts/ffn', str(i), NAMES[0], b'', i, 30.).signed(AUTHORS[0].private_key.sign) for i in range(20)]
    forged = replace(signed[3], value=b'another')
    for _ in range(2): assert all(map(authentic, signed)) and not authentic(forged)
    assert len(records.verified) <= 8
