"Hosts of one expert that learn from different gradients stay together. In memory, under a clock that skips the waiting"
from contextlib import asynccontextmanager

import pytest, torch, trio
from memory import simulate
from test_audit import EXPERTS, Scene

from lah_nb.errors import LahError
from lah_nb.mixture.adoption import keep_alive
from lah_nb.mixture.copies import Copies
from lah_nb.mixture.experts import Expert
from lah_nb.mixture.packed import pack_expert
from lah_nb.mixture.replicas import MEET_WITHIN, RESTED, SHUN, Replicas, distance
from lah_nb.mixture.server import Server
from lah_nb.network import DHT, MemoryHub
from lah_nb.network.calls import Served

UID = 'ffn.0'


async def inline(fn): return fn()


class Hosts:
    "Peers in memory that all host one expert"
    def __init__(self, hub, nursery): self.hub, self.nursery, self.all = hub, nursery, []

    async def add(self, expert=None, alive=True):
        dht = DHT(self.hub.peer(), clock=trio.current_time)
        await self.nursery.start(dht.run)
        if self.all: await dht.join({self.all[0].network.peer_id: self.all[0].network.addrs})
        server = Server(dht.network, dht, [expert or Expert(UID, 'ffn', 8)])
        server.runtime.execute = inline
        replicas = Replicas(Copies(server))
        if alive: server.tasks += [replicas.run]
        self.all.append(replicas)
        await self.nursery.start(server.run)
        return replicas

    async def teach(self, replicas, seed, updates, pause=0.05):
        g, expert = torch.Generator().manual_seed(seed), expert_of(replicas)
        for _ in range(updates):
            x = torch.randn(4, 8, generator=g)
            await replicas.server.runtime.submit('backward', [(UID, x, expert.forward(x) - x.sin() * (1 + seed), 0)], trio.current_time() + 1)
            await trio.sleep(pause)


def expert_of(replicas): return replicas.server.experts[UID]
def apart(*hosts): return max(distance(expert_of(hosts[0]).state(), expert_of(other).state()) for other in hosts[1:])


def story(afn):
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            await afn(Hosts(hub, nursery))
            nursery.cancel_scope.cancel()
    simulate(main)


@pytest.mark.parametrize('number, updates', [(2, 1000), (3, 300)])
def test_hosts_that_are_fed_different_gradients_end_together(number, updates):
    async def main(hosts):
        all = [await hosts.add() for _ in range(number)]
        async with trio.open_nursery() as learning:
            for seed, each in enumerate(all): learning.start_soon(hosts.teach, each, seed, updates)
        assert 0 < apart(*all) < 0.3
        await trio.sleep(2 * MEET_WITHIN)
        assert apart(*all) < 1e-5
        assert len({expert_of(each).updates for each in all}) == 1 and expert_of(all[0]).updates >= updates * number - 100
        moved, calls = sum(each.meetings for each in all), sum(each.network.calls for each in all)
        await trio.sleep(100)
        assert sum(each.meetings for each in all) == moved  # nothing changes, nothing is sent
        assert sum(each.network.calls for each in all) - calls < 100 * 5 * number
    story(main)


def test_who_begins_from_nothing_takes_over_what_the_other_knows():
    async def main(hosts):
        a = await hosts.add()
        await hosts.teach(a, 0, 300, pause=0)
        before = expert_of(a).state()
        b = await hosts.add()
        await trio.sleep(4 * MEET_WITHIN)
        assert apart(a, b) < 1e-6 and distance(expert_of(a).state(), before) < 1e-6
        assert expert_of(b).updates >= 300
    story(main)


def test_nothing_is_lost_where_a_mean_does_not_arrive_and_the_next_brings_it():
    async def main(hosts):
        a, b = await hosts.add(), await hosts.add()
        lost = []
        for each in a, b:
            right = each.network.methods['call.met']
            async def lose(request, right=right):
                lost.append(trio.current_time())
                if len(lost) > 1: return await right.handler(request)
                raise LahError('lost')
            each.network.methods['call.met'] = Served(lose, right.check)
        async with trio.open_nursery() as learning:
            for seed, each in enumerate([a, b]): learning.start_soon(hosts.teach, each, seed, 400)
        await trio.sleep(60)
        assert len(lost) >= 2 and apart(a, b) < 1e-5
        assert expert_of(a).updates == expert_of(b).updates >= 700
    story(main)


def test_a_silent_host_costs_the_other_nothing():
    async def main(hosts):
        a, b = await hosts.add(), await hosts.add()
        await trio.sleep(15)
        b.network.silent = True
        began = trio.current_time()
        await hosts.teach(a, 0, 400)
        assert trio.current_time() - began < 0.05 * 400 + 1 and expert_of(a).updates >= 400
        b.network.silent = False
        await trio.sleep(60)
        assert apart(a, b) < 1e-6
    story(main)


def test_who_rests_meets_at_once():
    async def main(hosts):
        a, b = await hosts.add(), await hosts.add()
        await trio.sleep(2 * MEET_WITHIN)
        await hosts.teach(a, 0, 30)
        await trio.sleep(RESTED + 1)
        await hosts.teach(a, 0, 5)  # too few to meet for their sake
        assert apart(a, b) > 0
        await trio.sleep(RESTED + 1)
        assert apart(a, b) < 1e-6
    story(main)


def test_who_asks_while_another_is_given_waits():
    async def main(hosts):
        a, b = await hosts.add(alive=False), await hosts.add(alive=False)
        given = []
        async def ask():
            await b.network.call(a.network.peer_id, 'call.meet', {'uid': UID}, timeout=5.)
            given.append(trio.current_time())
        async with trio.open_nursery() as nursery:
            for _ in range(3): nursery.start_soon(ask)
        assert len(given) == 3 and given[0] < given[1] < given[2] < given[0] + 1
    story(main)


def nan(expert): expert.flat[3] = torch.nan
def huge(expert): expert.flat.mul_(1e6)
def turned(expert): expert.flat.neg_()
def wider(expert): expert.__init__(UID, 'ffn', 16)


@pytest.mark.parametrize('spoil', [nan, huge, turned, wider])
def test_a_liars_state_is_refused_and_the_honest_go_on(spoil):
    "In either role: the one who convenes, and the one who is asked"
    async def main(hosts):
        a, b, liar = await hosts.add(), await hosts.add(), await hosts.add(alive=False)
        async with trio.open_nursery() as learning:
            for seed, each in enumerate([a, b]): learning.start_soon(hosts.teach, each, seed, 100)
        false = Expert(UID, 'ffn', 8)
        false.updates = 5000
        spoil(false)
        packed = pack_expert(false, {name: t for name, t in false.state().items() if not name.startswith('optimizer.')})
        data = [torch.frombuffer(bytearray(packed), dtype=torch.uint8)]
        async def lie(request): return {}, data
        liar.network.serve('call.meet', lie)
        liar.server.experts[UID].updates = 150
        async with trio.open_nursery() as learning:
            for seed, each in enumerate([a, b]): learning.start_soon(hosts.teach, each, seed, 400)
        for each in a, b:  # and it pretends to convene
            await trio.sleep(2)
            await liar.network.call(each.network.peer_id, 'call.meet', {'uid': UID}, timeout=5.)
            before = expert_of(each).flat.clone()
            with pytest.raises(Exception, match='weights that are|NaN|something else|than a state'):
                await liar.network.call(each.network.peer_id, 'call.met', {'uid': UID}, data, timeout=5.)
            assert torch.equal(expert_of(each).flat, before)
        await trio.sleep(SHUN)
        assert apart(a, b) < 1e-5 and expert_of(a).flat.isfinite().all() and a.meetings + b.meetings >= 2
    story(main)


def test_a_mean_is_taken_only_from_who_asked_and_only_if_it_is_newer():
    async def main(hosts):
        a, b = await hosts.add(alive=False), await hosts.add(alive=False)
        stranger = hosts.hub.peer()
        await hosts.teach(a, 0, 10)
        data = [torch.frombuffer(bytearray(pack_expert(expert_of(a))), dtype=torch.uint8)]
        call = lambda who, method, *body: who.call(a.network.peer_id, method, {'uid': UID}, *body, timeout=5.)
        with pytest.raises(Exception, match='you do not host'): await call(stranger, 'call.meet')
        for who in stranger, b.network:
            with pytest.raises(Exception, match='you did not ask'): await call(who, 'call.met', data)
        await call(b.network, 'call.meet')
        with pytest.raises(Exception, match='a mean of 10 updates, where 10 were given'): await call(b.network, 'call.met', data)
    story(main)


class Twins(Scene):
    "Hosts of the same experts"
    def uid(self, host, i): return f'e.{i}'

    async def build(self, hosts, trainers):
        await super().build(hosts, trainers)
        self.replicas = [Replicas(Copies(server)) for server in self.servers]
        for each in self.replicas: self.nursery.start_soon(each.run)
        return self


def test_audits_never_accuse_hosts_that_meet():
    found = []
    async def main():
        async with MemoryHub(latency=0.01, seed=0) as hub, trio.open_nursery() as nursery:
            s = await Twins(hub, nursery, 0, 'ffn').build(2, 2)
            for roster in s.rosters: roster.audits._share_again = roster.audits._share_of_fetches = lambda *about: 0.5
            async def train(roster, pause):
                for _ in range(100):
                    await s.step(roster)
                    await trio.sleep(pause)
            async with trio.open_nursery() as training:
                for i, roster in enumerate(s.rosters): training.start_soon(train, roster, 0.1 + 0.13 * i)
            found.append(sum(each.meetings for each in s.replicas))
            for roster in s.rosters:
                assert not roster.left and not roster.benched
                found.append(sum(standing.checked for standing in roster.audits.standings.values()))
                assert not any(standing.wrong or standing.doubted for standing in roster.audits.standings.values())
            nursery.cancel_scope.cancel()
    simulate(main)
    assert found[0] >= 3 * EXPERTS and min(found[1:]) > 50, found
