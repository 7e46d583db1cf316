"The calls of one batch, when hosts refuse, fall silent or answer nonsense. In memory, under a clock that skips the waiting"
import random
from contextlib import asynccontextmanager

import torch, trio
from memory import simulate, start

from lah_nb.errors import LahError
from lah_nb.mixture.dispatch import Ask, Call
from lah_nb.mixture.rounds import make_calls
from lah_nb.mixture.roster import Roster
from lah_nb.network import MemoryHub
from lah_nb.network.spec import Spec

LATENCY = 0.1  # seconds, one way


class Scene:
    "A trainer's roster, and hosts that answer ones, unless `behave` says otherwise"
    def __init__(self, dhts):
        self.hosts, self.asked, self.behave = [dht.peer_id for dht in dhts[1:]], [], {}
        self.roster = Roster(dhts[0].network, dhts[0], clock=trio.current_time, rng=random.Random(0))
        for dht in dhts[1:]: dht.network.serve('call.forward', self._handler(dht.peer_id))

    def _handler(self, peer_id):
        async def answer(request):
            self.asked.append(peer_id)
            if peer_id in self.behave: await self.behave[peer_id](request)
            return {'ok': [True], 'updates': [0]}, [torch.ones(1, 4)]
        return answer

    def ask(self, peer_id):
        call = Call(peer_id, [f'ffn.{self.hosts.index(peer_id)}'], [1], torch.tensor([self.hosts.index(peer_id)]), torch.tensor([0]), torch.tensor([0], dtype=torch.int32))
        return Ask(call, 'call.forward', call.meta(0), [torch.ones(1, 4), call.index], Spec('float32', (1, 4)))

    async def batch(self, *peers, **policy):
        "(outcomes, seconds) of one call to each"
        began = trio.current_time()
        policy = {'timeout': 10., 'grace': 1., 'enough': lambda outcomes: False} | policy
        outcomes = await make_calls(self.roster.network, self.roster, [self.ask(peer) for peer in peers or self.hosts], **policy)
        return outcomes, trio.current_time() - began


@asynccontextmanager
async def scene(hosts=3):
    async with MemoryHub(latency=LATENCY) as hub, trio.open_nursery() as nursery:
        s = Scene(await start(hub, hosts + 1, nursery))
        await nursery.start(s.roster.run)
        yield s
        nursery.cancel_scope.cancel()


def test_a_call_is_made_again_when_it_is_late_and_not_when_it_was_refused():
    async def refuse(request):
        await trio.sleep(0.1)  # so that an answer has come that shows that they spend their time on the way
        raise LahError('no')
    async def main():
        async with scene() as s:
            last = s.hosts[2]
            s.behave[last] = refuse
            outcomes, _ = await s.batch()
            assert s.asked.count(last) == 1 and len(outcomes) == 3
            async def lose_the_first(request):
                if s.asked.count(last) <= lost: await trio.sleep_forever()
            s.behave[last] = lose_the_first
            for lost in 1, 2:
                s.asked.clear()
                outcomes, seconds = await s.batch()
                assert s.asked.count(last) == 1 + lost and seconds < 1
                assert {o.call.peer_id for o in outcomes if o.tensor is not None} == set(s.hosts)
    simulate(main)


def test_a_roster_that_has_ended_benches_and_starts_nothing():
    async def main():
        async with scene() as s:
            late = Roster(s.roster.network, s.roster.dht, clock=trio.current_time)
            async with trio.open_nursery() as nursery:
                await nursery.start(late.run)
                nursery.cancel_scope.cancel()
            late.bench(s.hosts[0], 'late')
            late.doubt(s.hosts[1], 1.)
            late.start(trio.sleep, 1.)
            assert s.hosts[0] in late.benched
    simulate(main)


def test_a_host_that_refuses_or_is_slow_is_chosen_less():
    async def refuse(request): raise LahError('no')
    async def idle(request): await trio.sleep(0.8)
    async def main():
        async with scene() as s:
            for _ in range(3): await s.batch()
            even = [sum(s.roster.choose(s.hosts) == peer for _ in range(900)) for peer in s.hosts]
            assert min(even) > 200
            s.behave = {s.hosts[0]: refuse, s.hosts[1]: idle}
            for _ in range(4): await s.batch()
            shares = [sum(s.roster.choose(s.hosts) == peer for _ in range(900)) for peer in s.hosts]
            assert shares[0] < 30 and shares[1] < 200 and shares[2] > 700, shares
            s.behave.clear()
            for _ in range(20): await s.batch()
            assert min(sum(s.roster.choose(s.hosts) == peer for _ in range(900)) for peer in s.hosts) > 150
    simulate(main)


def stall(behave, seconds=60.):
    "What one host that behaves so costs a trainer: seconds beyond those of batches without it"
    found = []
    async def main():
        async with scene(4) as s:
            for _ in range(5): _, calm = await s.batch()
            first = s.hosts[0]
            if behave is None: s.roster.network.hub.peers[first].silent = True
            else: s.behave[first] = behave
            began, lost = trio.current_time(), 0.
            while trio.current_time() - began < seconds:
                _, took = await s.batch(*[peer for peer in s.hosts if peer not in s.roster.benched], enough=lambda outcomes: bool(outcomes))
                lost += took - calm
            s.behave.clear()
            s.roster.network.hub.peers[first].silent = False
            await trio.sleep(30)
            assert first not in s.roster.benched  # it is well again, and has its place back
            found.append(lost)
    simulate(main)
    return found[0]


async def hang(request): await trio.sleep_forever()

async def never_in_time(request): await trio.sleep(30)


def test_half_dead_hosts_cost_no_more_than_silent_ones():
    "Both answer pings at once"
    silent = stall(None)
    assert 0 < silent < 3
    assert stall(hang) <= silent + 0.5 and stall(never_in_time) <= silent + 0.5


def test_who_is_in_a_hurry_makes_calls_several_times_where_that_is_quicker():
    rng = random.Random(1)
    async def moody(request):
        await trio.sleep(min(rng.expovariate(2.5), 0.9))
    async def train(s, rounds, hurry=True):
        "Seconds of a round, and calls that came to hosts in it"
        s.asked.clear()
        seconds = 0.
        for _ in range(rounds):
            outcomes, took = await s.batch(timeout=20., hurry=hurry)
            assert {o.call.peer_id for o in outcomes if o.tensor is not None} == set(s.hosts)
            seconds += took
        return seconds / rounds, len(s.asked) / rounds
    async def main():
        async with scene() as s:
            seconds, calls = await train(s, 200)
            assert abs(seconds - 2 * LATENCY) < 1e-6 and calls < 4 and s.roster.repeats.usual == 1  # always as quick: tried now and then
            s.behave = dict.fromkeys(s.hosts, moody)
            once, calls = await train(s, 100, hurry=False)
            assert calls < 4.5
            await train(s, 400)
            assert s.roster.repeats.usual > 1
            often, calls = await train(s, 300)
            assert often < 0.7 * once and calls > 7, (once, often)
    simulate(main)


def test_the_second_copy_of_a_call_ends_when_the_first_is_answered():
    async def main():
        async with scene() as s:
            s.roster.repeats.n = 2
            slow, quick = s.hosts[0], s.hosts[1]
            async def only_the_first(request):
                if s.asked.count(quick) > 1: await trio.sleep_forever()
            s.behave = {slow: lambda request: trio.sleep(0.4), quick: only_the_first}
            got = []
            async def batch(): got.extend(await s.batch(hurry=True))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(batch)
                await trio.sleep(2 * LATENCY + 0.01)
                assert {peer: s.roster.calls[peer][0] for peer in s.hosts} == {slow: 2, quick: 0, s.hosts[2]: 0}
            outcomes, seconds = got
            assert len(outcomes) >= 6 and sum(not o.needless for o in outcomes) == 3 and abs(seconds - 0.6) < 0.01
            assert not any(counts[0] for counts in s.roster.calls.values())
    simulate(main)
