"Who has just joined lets others read for it"
import pytest, trio

from lah_nb import LahError
from lah_nb.network import DHT, MemoryHub, Record
from lah_nb.network.reading import KEEP_FRESH, MAX_READ, REFETCH
from memory import simulate, start

KEY = 'experts/ffn'


async def newcomer(hub, nursery, through: DHT) -> DHT:
    dht = DHT(hub.peer(), clock=trio.current_time)
    await nursery.start(dht.run)
    await dht.join({through.peer_id: through.network.addrs})
    return dht


async def announced(hub, nursery, n=12) -> list[DHT]:
    dhts = await start(hub, n, nursery)
    await trio.sleep(30)
    for i, dht in enumerate(dhts): await dht.announce({(KEY, str(i)): b'x'})
    return dhts


async def read(dht) -> set[str]: return {record.subkey for record in (await dht.get([KEY]))[KEY]}


@pytest.mark.parametrize('answer', ['forged', 'none', 'nonsense', 'silence'])
def test_a_host_that_reads_wrongly_costs_a_moment(answer):
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            async def lie(request):
                if answer == 'silence': await trio.sleep_forever()
                record = Record(KEY, 'invented', dhts[3].peer_id, b'x', 10**15, 30.).signed(dhts[0].network.sign)
                return {'found': {'forged': [[record.to_list(30.)]], 'none': [[]], 'nonsense': [7, 'x']}[answer]}, ()
            dhts[0].network.serve('dht.read', lie)
            late = await newcomer(hub, nursery, dhts[0])
            began = trio.current_time()
            assert await read(late) == {str(i) for i in range(12)}
            assert trio.current_time() - began < 2.
            nursery.cancel_scope.cancel()
    simulate(main)


def test_what_a_host_leaves_out_is_found_seconds_later():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            honest = dhts[0].network.methods['dht.read'].handler
            async def hide(request):
                meta, _ = await honest(request)
                return {'found': [records[:1] for records in meta['found']]}, ()
            dhts[0].network.serve('dht.read', hide)
            late = await newcomer(hub, nursery, dhts[0])
            assert len(await read(late)) == 1
            await trio.sleep(2 * REFETCH)
            assert len(await read(late)) == 12 and not late.new_here
            nursery.cancel_scope.cancel()
    simulate(main)


def test_only_what_is_to_be_kept_fresh_is_asked_for_again():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            reader, asked = dhts[4], []
            call = reader.network.call
            async def counted(peer, method, meta, *args, **options):
                asked.append((method, meta))
                return await call(peer, method, meta, *args, **options)
            reader.network.call = counted
            async def times(seconds):
                asked.clear()
                await trio.sleep(seconds)
                return sum(method == 'dht.find' and KEY in meta['keys'] for method, meta in asked)
            async def now_and_then(): return {record.subkey for record in (await reader.get([KEY], max_age=10., keep_fresh=False))[KEY]}
            assert len(await now_and_then()) == 12 and await times(9.) == 0
            await dhts[7].withdraw([(KEY, '7')])
            assert len(await now_and_then()) == 12  # as old as it may be
            await trio.sleep(2.)
            assert len(await now_and_then()) == 11 and await times(9.) == 0
            await read(reader)
            assert await times(9.) >= 6 and len(await now_and_then()) == 11
            nursery.cancel_scope.cancel()
    simulate(main)


def test_what_may_be_wanted_next_and_is_not_there_is_not_looked_up():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            late = await newcomer(hub, nursery, dhts[0])
            calls = late.network.calls
            found = await late.get([KEY], ahead=[f'{KEY}.{i}' for i in range(8)])
            assert len(found[KEY]) == 12 and late.network.calls == calls + 1
            assert not (await late.get([f'{KEY}.3']))[f'{KEY}.3'] and late.network.calls > calls + 2
            nursery.cancel_scope.cancel()
    simulate(main)


def test_what_is_asked_afresh_is_read_by_the_newcomer_itself():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            asked = []
            async def read(request):
                asked.append(request.peer_id)
                return {'found': []}, ()
            for dht in dhts: dht.network.serve('dht.read', read)
            late = await newcomer(hub, nursery, dhts[0])
            assert len((await late.get([KEY], max_age=0.))[KEY]) == 12 and not asked
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('near', [True, False])
def test_where_the_way_is_short_only_what_is_there_is_read_ahead(near):
    async def main():
        async with MemoryHub(latency=0.02 if near else 0.06) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            for i in 2, 5: await dhts[i].announce({(f'{KEY}.{i}', '0'): b'y'})
            reader, asked = dhts[0], set()
            call = reader.network.call
            async def noted(peer, method, meta, *args, **options):
                if method == 'dht.find' and meta['values']: asked.update(meta['keys'])
                return await call(peer, method, meta, *args, **options)
            reader.network.call = noted
            ahead = [f'{KEY}.{i}' for i in range(40)]  # twelve of which are there, and two have something
            async def read_ahead():
                asked.clear()
                meta, _ = await dhts[9].network.call(reader.peer_id, 'dht.read', {'keys': [KEY, *ahead], 'ahead': 40}, timeout=9.)
                return [len(records) for records in meta['found']]
            found = await read_ahead()
            assert found[0] >= 12 and [i for i, n in enumerate(found[1:]) if n] == [2, 5]
            assert asked == ({KEY, *ahead[:12]} if near else {KEY, *ahead})
            await read_ahead()  # with what is under the key at hand
            assert asked <= set(ahead[:12]) | {KEY}
            nursery.cancel_scope.cancel()
    simulate(main)


def test_what_was_read_ahead_in_vain_is_looked_up_for_who_needs_it():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            await dhts[3].announce({(f'{KEY}.3', '0'): b'y'})
            honest = dhts[0].network.methods['dht.read'].handler
            async def hide(request):
                meta, _ = await honest(request)
                return {'found': meta['found'][:1] + [[] for _ in meta['found'][1:]]}, ()
            dhts[0].network.serve('dht.read', hide)
            late = await newcomer(hub, nursery, dhts[0])
            async with trio.open_nursery() as both:
                both.start_soon(lambda: late.get([KEY], ahead=[f'{KEY}.3']))
                await trio.sleep(0.01)  # it is being read ahead now
                assert [record.value for record in (await late.get([f'{KEY}.3']))[f'{KEY}.3']] == [b'y']
            nursery.cancel_scope.cancel()
    simulate(main)


def test_what_is_read_for_others_is_soon_forgotten_and_bounded():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            async def ask(keys, ahead=0):
                return (await dhts[5].network.call(dhts[0].peer_id, 'dht.read', {'keys': keys, 'ahead': ahead}, timeout=5.))[0]['found']
            [found] = await ask([KEY])
            assert {Record.from_list(raw)[0].subkey for raw in found} == {str(i) for i in range(12)} and KEY in dhts[0]._cache
            await trio.sleep(KEEP_FRESH / 2)
            assert KEY not in dhts[0]._cache
            for keys in [f'{KEY}.{i}' for i in range(MAX_READ + 1)], ['no key'], 'experts/ffn', [7]:
                with pytest.raises(LahError): await ask(keys)
            for ahead in -1, None, 'all':
                with pytest.raises(LahError): await ask([KEY], ahead)
            with pytest.raises(LahError, match='too much|the last second'):
                for n in range(20): await ask([f'{KEY}.{n}.{i}' for i in range(MAX_READ)])
            nursery.cancel_scope.cancel()
    simulate(main)


def test_nobody_waits_for_what_is_fetched_again():
    async def main():
        async with MemoryHub(latency=1.5) as hub, trio.open_nursery() as nursery:
            dhts = await announced(hub, nursery)
            reader = dhts[5]
            await read(reader)
            waited = []
            for _ in range(600):
                began = trio.current_time()
                assert await read(reader) == {str(i) for i in range(12)}
                waited.append(trio.current_time() - began)
                await trio.sleep(0.1)
            assert max(waited) == 0., max(waited)
            assert trio.current_time() - reader._cache[KEY].fetched < 4 * REFETCH  # and it was
            nursery.cancel_scope.cancel()
    simulate(main)
