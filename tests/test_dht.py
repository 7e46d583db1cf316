"Records over many peers: in memory under a clock that skips the waiting, and over libp2p with processes that stop."
import math, os, random, signal, subprocess, sys, time

import pytest, trio
from conftest import freeze
from memory import simulate, start

from lah_nb.network import DHT, MemoryHub, NoPeers, Record, Unanswered, new_identity, pack, peer_id_of
from lah_nb import Swarm
from lah_nb.errors import LahError


def test_two_hundred_peers_in_memory():
    "All of 200 experts are found from anywhere, and still are right after 30% of the peers fell silent"
    async def main():
        async with MemoryHub(latency=0.03) as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 200, nursery)
            for i, dht in enumerate(dhts[:100]): await dht.announce({('experts/ffn', str(2 * i)): b'', ('experts/ffn', str(2 * i + 1)): b''})
            for dht in random.Random(0).sample(dhts, 10): assert len((await dht.get(['experts/ffn'], max_age=0))['experts/ffn']) == 200
            for dht in dhts[130:190]: dht.network.silent = True
            for dht in dhts[100:110]:
                begin = trio.current_time()
                assert len((await dht.get(['experts/ffn'], max_age=0))['experts/ffn']) == 200
                assert trio.current_time() - begin < 5
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_read_whose_time_is_up_says_so():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 4, nursery)
            for dht in dhts[1:]: dht.network.silent = True
            for _ in range(2):
                with pytest.raises(Unanswered): await dhts[0].get(['experts/ffn'], timeout=0.2)
            nursery.cancel_scope.cancel()
    trio.run(main)  # a real clock: whatever is computed takes time


def test_records_expire_unless_renewed_and_withdrawn_ones_are_gone():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            a, b, c, d = await start(hub, 4, nursery)
            await a.announce({('experts/ffn', '1'): b'a'})
            await b.announce({('experts/ffn', '1'): b'b', ('experts/ffn', '2'): b'b'})
            async def read(): return sorted((r.subkey, r.value) for r in (await d.get(['experts/ffn'], max_age=0))['experts/ffn'])
            await trio.sleep(100)
            assert await read() == [('1', b'a'), ('1', b'b'), ('2', b'b')]  # renewed ten times
            await b.withdraw([('experts/ffn', '1')])
            assert await read() == [('1', b'a'), ('2', b'b')]
            a.network.silent = True
            await trio.sleep(31)
            assert await read() == [('2', b'b')]
            nursery.cancel_scope.cancel()
    simulate(main)


def test_background_renewal_sees_newcomers():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            a, b, c = await start(hub, 3, nursery)
            await a.announce({('experts/ffn', '1'): b'a'})
            assert len((await c.get(['experts/ffn']))['experts/ffn']) == 1
            await b.announce({('experts/ffn', '2'): b'b'})
            await trio.sleep(5)
            asked = c.network.calls
            assert len((await c.get(['experts/ffn']))['experts/ffn']) == 2
            assert c.network.calls == asked  # from the cache
            nursery.cancel_scope.cancel()
    simulate(main)


def test_nobody_writes_in_anothers_name():
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            a, b, c = await start(hub, 3, nursery)
            await a.announce({('experts/ffn', '1'): b'a'})
            [record] = (await b.get(['experts/ffn'], max_age=0))['experts/ffn']
            later = Record(record.key, record.subkey, record.author, None, record.seq + 10**6, record.ttl)
            for forged in later.signed(b.network.sign), Record(**{**later.__dict__, 'signature': record.signature}):
                with pytest.raises(LahError, match='not signed'):
                    await b.network.call(c.peer_id, 'dht.store', {'records': [forged.to_list(30.)], 'addrs': []}, timeout=2)
            assert len((await c.get(['experts/ffn'], max_age=0))['experts/ffn']) == 1
            nursery.cancel_scope.cancel()
    simulate(main)


def test_an_old_record_played_back_stays_dead():
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            a, b, c = await start(hub, 3, nursery)
            await a.announce({('experts/ffn', '1'): b'a'})
            [record] = (await b.get(['experts/ffn'], max_age=0))['experts/ffn']
            await a.withdraw()
            await trio.sleep(60)
            for dht in a, c:
                meta, _ = await b.network.call(dht.peer_id, 'dht.store', {'records': [record.to_list(30.)], 'addrs': []}, timeout=2)
                assert meta['stored'] == 0
            assert (await c.get(['experts/ffn'], max_age=0))['experts/ffn'] == []
            nursery.cancel_scope.cancel()
    simulate(main)


def test_clocks_that_disagree():
    "An author whose clock is a day off, or was set back, is heard all the same"
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 3, nursery)
            dhts[0].clock = lambda: trio.current_time() + 86400
            await dhts[0].announce({('experts/ffn', '1'): b''})
            dhts[0].clock = lambda: trio.current_time() + 100.
            dhts[0]._seq = 0  # as after a restart
            for _ in range(2): await dhts[0].announce({('experts/ffn', '2'): b''})  # the first is refused, and says why
            assert len((await dhts[2].get(['experts/ffn'], max_age=0))['experts/ffn']) == 2
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('method, meta', [
    ('dht.find', {}), ('dht.find', {'keys': ['x'], 'values': True, 'addrs': []}), ('dht.find', {'keys': ['a/b'] * 2000, 'values': True, 'addrs': []}), ('dht.find', {'keys': [b'a/b'], 'values': True, 'addrs': []}),
    ('dht.find', {'keys': ['a/b'], 'values': True, 'addrs': ['not an address']}), ('dht.store', {'records': [[]], 'addrs': []}), ('dht.store', {'records': 5, 'addrs': []}),
    ('dht.store', {'records': [['k/', 's', 'a', b'', -1, 30., b'', 30.]], 'addrs': []}), ('dht.store', {'records': [['k/', 's', 'a', b'', 1, 1e9, b'', 30.]], 'addrs': []})])
def test_hostile_requests_are_refused(method, meta):
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            a, b = await start(hub, 2, nursery)
            with pytest.raises(LahError): await a.network.call(b.peer_id, method, meta, timeout=2)
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('near', [['../../etc'], [{}], [[]], [5]])
def test_a_lying_peer_is_shunned_and_the_rest_found(near):
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 6, nursery)
            await dhts[0].announce({('experts/ffn', '1'): b'x'})
            async def lie(request): return {'near': [near], 'addrs': {}, 'found': [[['experts/ffn', '9', dhts[0].peer_id, b'fake', 1, 30., b'0' * 64, 30.]]]}, ()
            dhts[3].network.serve('dht.find', lie)
            found = (await dhts[5].get(['experts/ffn'], max_age=0))['experts/ffn']
            assert [r.subkey for r in found] == ['1'] and dhts[3].peer_id in dhts[5].contacts.shunned
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_peer_that_answers_nonsense_does_not_end_the_one_that_stores():
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            a, b, c = await start(hub, 3, nursery)
            async def nonsense(caller, message, codec, reply, done):
                reply.append(pack({'neither': 'result nor error'}))
                done.set()
            b.network._answer = nonsense
            await a.announce({('experts/ffn', '1'): b'x'})
            assert [r.subkey for r in (await c.get(['experts/ffn'], max_age=0))['experts/ffn']] == ['1']
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('seconds, loss', [(0.15, 0.), (0.3, 0.), (1., 0.), (0.1, 0.03)])
def test_over_far_links_the_first_look_up_finds_everything_or_says_that_it_does_not(seconds, loss):
    async def main():
        rng, found = random.Random(0), []
        def latency(here, there): return math.inf if rng.random() < loss else seconds * (1 + loss * 10 * rng.random())
        async with MemoryHub(latency) as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 12, nursery)
            for i, dht in enumerate(dhts): nursery.start_soon(dht.announce, {('experts/ffn', str(i)): b''})
            await trio.sleep(25)
            for dht in rng.sample(dhts, 6):
                (network := hub.peer()).addrs = []  # a trainer that nobody can dial
                fresh = DHT(network, clock=trio.current_time)
                await nursery.start(fresh.run)
                await fresh.join({dht.peer_id: dht.network.addrs}, timeout=20)
                try: found.append(len((await fresh.get(['experts/ffn']))['experts/ffn']))
                except Unanswered: found.append(None)
            nursery.cancel_scope.cancel()
        assert set(found) <= ({12, None} if loss else {12}) and found.count(12) >= 5
    simulate(main)


def test_two_halves_of_a_swarm_find_each_other_again():
    "Cut in two for longer than records live; trainers too, in either half"
    async def main():
        left = set()
        def latency(here, there): return math.inf if (here in left) != (there in left) else 0.05
        async with MemoryHub(latency) as hub, trio.open_nursery() as nursery:
            dhts = await start(hub, 12, nursery)
            for network in (trainers := [hub.peer() for _ in range(2)]): network.addrs = []
            dhts += (trainers := [DHT(network, clock=trio.current_time) for network in trainers])
            for trainer in trainers:
                await nursery.start(trainer.run)
                await trainer.join({dhts[0].peer_id: dhts[0].network.addrs})
            for i, dht in enumerate(dhts[:12]): await dht.announce({('experts/ffn', str(i)): b''})
            left.update(dht.peer_id for dht in [*dhts[:5], trainers[0]])
            await trio.sleep(90)
            async def read(dht): return len((await dht.get(['experts/ffn'], max_age=0))['experts/ffn'])
            assert [await read(dht) for dht in trainers] == [5, 7]
            left.clear()
            await trio.sleep(30)
            assert [await read(dht) for dht in dhts] == [12] * 14
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('listed', [False, True])
def test_a_trainer_comes_back_seconds_after_an_outage_of_its_network(listed):
    "And meanwhile says that it does not know, rather than that there is nothing"
    async def main():
        async with MemoryHub(latency=0.05) as hub, trio.open_nursery() as nursery:
            peer, trainer = await start(hub, 2, nursery)
            trainer.network.addrs = peer.network.addrs if listed else []
            await peer.announce({('experts/ffn', '1'): b''})
            assert (await trainer.get(['experts/ffn']))['experts/ffn']
            trainer.network.silent = True
            await trio.sleep(45)
            assert not trainer.peers
            with pytest.raises(Unanswered, match='on a network'): await trainer.get(['experts/ffn'])
            trainer.network.silent = False
            healed = trio.current_time()
            assert (await trainer.get(['experts/ffn'], timeout=20))['experts/ffn']  # it waits for that
            assert trio.current_time() - healed < 10  # a question every five seconds at least, whose answer is awaited for three
            nursery.cancel_scope.cancel()
    simulate(main)


def test_peers_that_start_before_the_first_is_up_end_in_one_swarm():
    async def main():
        async with MemoryHub(latency=0.02) as hub, trio.open_nursery() as nursery:
            networks = [hub.peer() for _ in range(5)]
            networks[0].silent = True
            everyone = {network.peer_id: network.addrs for network in networks[:2]}  # the same list for all
            dhts = [DHT(network, clock=trio.current_time) for network in networks]
            for dht in dhts: await nursery.start(dht.run)
            async with trio.open_nursery() as joining:
                for dht in dhts: joining.start_soon(dht.join, everyone)
                await trio.sleep(5)
                networks[0].silent = False
            for i, dht in enumerate(dhts): await dht.announce({('experts/ffn', str(i)): b''})
            await trio.sleep(10)
            for dht in dhts: assert len((await dht.get(['experts/ffn'], max_age=0))['experts/ffn']) == 5
            nursery.cancel_scope.cancel()
    simulate(main)


def test_who_has_forty_addresses_is_cut_short_not_refused():
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            a, b = await start(hub, 2, nursery)
            (network := hub.peer()).addrs = [f'/ip4/10.0.0.{i}/tcp/4001' for i in range(40)]
            dht = DHT(network, clock=trio.current_time)
            await nursery.start(dht.run)
            await dht.join({a.peer_id: a.network.addrs})
            await dht.announce({('experts/ffn', '1'): b''})
            assert len((await b.get(['experts/ffn'], max_age=0))['experts/ffn']) == 1 and len(a.contacts.addrs[dht.peer_id]) == 16
            nursery.cancel_scope.cancel()
    simulate(main)


def test_joining_nobody_says_so():
    with pytest.raises(NoPeers, match='Is that peer running'): Swarm.join(f'/ip4/127.0.0.1/tcp/9/p2p/{peer_id_of(new_identity())}', timeout=3)


def wait_until(complete, seconds=40):
    "Many peers that start at once on a small machine may need a renewal to reach everyone"
    deadline = time.monotonic() + seconds
    while not complete() and time.monotonic() < deadline: time.sleep(0.5)


SEVERAL = '''
import sys, trio
from lah_nb.network import DHT, Host, split_addr
async def main(n, first, addrs):
    async with trio.open_nursery() as nursery:
        for i in range(n):
            host = Host()
            await nursery.start(host.run)
            dht = DHT(host)
            await nursery.start(dht.run)
            seeds = {}
            for addr in addrs: seeds.setdefault(split_addr(addr)[0], []).append(addr)
            if seeds: await dht.join(seeds, timeout=60)
            addrs = addrs or host.addrs
            await dht.announce({('experts/ffn', str(first + i)): b''})
        print(addrs[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
trio.run(main, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
'''


@pytest.fixture
def processes():
    started = []
    def start(n, first, *addrs):
        p = subprocess.Popen([sys.executable, '-c', SEVERAL, str(n), str(first), *addrs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(p)
        addr = p.stdout.readline().strip()
        assert addr, 'peers could not start'
        return p, addr
    yield start
    for p in started:
        p.kill(), p.wait()
        p.stdin.close(), p.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_thirty_two_peers_over_libp2p_and_a_third_of_them_stopped(processes):
    first, addr = processes(11, 0)
    processes(11, 11, addr)
    victim, _ = processes(10, 22, addr)
    with Swarm.join(addr, timeout=60) as swarm:
        def read(max_age=0., timeout=5.): return {r.subkey for r in swarm.portal.run(lambda: swarm.dht.get(['experts/ffn'], max_age=max_age, timeout=timeout))['experts/ffn']}
        wait_until(lambda: len(read()) == 32)
        for _ in range(5): assert read() == {str(i) for i in range(32)}
        freeze(victim.pid)
        time.sleep(10)
        for _ in range(10):
            begin = time.monotonic()
            assert read() >= {str(i) for i in range(22)}
            assert time.monotonic() - begin < 5
        os.kill(victim.pid, signal.SIGCONT)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_sixty_four_peers_over_libp2p(processes):
    _, addr = processes(16, 0)
    for first in 16, 32, 48: processes(16, first, addr)
    with Swarm.join(addr, timeout=60) as swarm:
        found = lambda: len(swarm.portal.run(lambda: swarm.dht.get(['experts/ffn'], max_age=0))['experts/ffn'])
        wait_until(lambda: found() == 64)
        for _ in range(3): assert found() == 64
