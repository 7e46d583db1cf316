"Rows that travel once: the backward call names those of the forward call, and brings them where they are forgotten"
import random
from contextlib import asynccontextmanager

import pytest, torch, trio
from memory import simulate, start

from lah_nb.mixture.dispatch import Ask, Call
from lah_nb.mixture.experts import Expert
from lah_nb.mixture.kept import Kept
from lah_nb.mixture.rounds import _say, make_calls
from lah_nb.mixture.roster import Roster
from lah_nb.mixture.runtime import Runtime
from lah_nb.mixture.server import Server
from lah_nb.network import MemoryHub, Refused
from lah_nb.network.spec import Spec

ROWS, INDEX = torch.arange(24.).view(3, 8) / 24, torch.tensor([0, 2, 1], dtype=torch.int32)
GRAD, WEIGHTS = torch.ones(3, 8), torch.tensor([0.5, 1., 2.])
PLENTY = dict(timeout=10., grace=1., enough=lambda outcomes: False)


@asynccontextmanager
async def scene():
    "A host of two experts, a trainer's roster, and how many tensors each of its calls has brought"
    async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
        host, trainer = await start(hub, 2, nursery)
        experts = {uid: Expert(uid, 'ffn', 8, optimizer='sgd', lr=0.1) for uid in ('e.0', 'e.1')}
        async def at_once(fn): return fn()
        server = Server(host.network, host, list(experts.values()), runtime=Runtime(experts, execute=at_once, clock=trio.current_time))
        await nursery.start(server.run)
        roster, brought, call = Roster(trainer.network, trainer, clock=trio.current_time, rng=random.Random(0)), [], trainer.network.call
        async def counted(peer_id, method, meta, tensors=(), **options):
            if method != 'dht.find': brought.append((method.removeprefix('call.'), len(tensors)))
            return await call(peer_id, method, meta, tensors, **options)
        trainer.network.call = counted
        yield server, roster, brought
        nursery.cancel_scope.cancel()


def asks(server, name=b'these rows'):
    call = Call(server.network.peer_id, ['e.0', 'e.1'], [2, 1], torch.arange(3), torch.arange(3), INDEX, kept_as=name)
    forward = Ask(call, 'call.forward', call.meta(0) | {'keep': name}, [ROWS, INDEX], Spec('float32', (3, 8)))
    meta = call.meta(0, b'once') | {'kept': name}
    return forward, Ask(call, 'call.backward', meta, [ROWS, INDEX, GRAD, WEIGHTS], Spec('float32', (3, 8)), there=2 * bool(name))


async def there_and_back(server, roster, name=b'these rows', between=lambda: None):
    forward, backward = asks(server, name)
    await make_calls(roster.network, roster, [forward], **PLENTY)
    between()
    (outcome,) = await make_calls(roster.network, roster, [backward], **PLENTY)
    return outcome, [(expert.updates, expert.flat.clone()) for expert in server.experts.values()]


@pytest.mark.parametrize('forgets', [False, True])
def test_the_same_is_learnt_whether_rows_are_kept_forgotten_or_sent_again(forgets):
    async def main(name):
        async with scene() as (server, roster, brought):
            def between():
                if forgets: server._kept = Kept()
            outcome, learnt = await there_and_back(server, roster, name, between)
            assert not server._kept and not server._kept.bytes
            return outcome, learnt, brought
    outcome, learnt, brought = simulate(lambda: main(b'these rows'))
    plain, right, all_of_it = simulate(lambda: main(b''))
    assert all_of_it == [('forward', 2), ('backward', 4)]
    assert brought == [('forward', 2), ('backward', 2)] + [('backward', 4)] * forgets
    assert torch.equal(outcome.tensor, plain.tensor) and [n for n, _ in learnt] == [1, 1]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(learnt, right))


def test_copies_of_a_backward_call_share_its_rows_and_its_answer():
    async def main():
        async with scene() as (server, roster, brought):
            forward, backward = asks(server)
            await make_calls(roster.network, roster, [forward], **PLENTY)
            answers = []
            async def ask():
                _, (gradient,) = await roster.network.call(server.network.peer_id, 'call.backward', backward.meta, [GRAD, WEIGHTS], timeout=5.)
                answers.append(gradient)
            async with trio.open_nursery() as both:
                for _ in range(3): both.start_soon(ask)
            await ask()
            assert all(torch.equal(answers[0], each) for each in answers) and len(answers) == 4
            assert [expert.updates for expert in server.experts.values()] == [1, 1] and not server._kept
    simulate(main)


def test_who_hears_too_late_that_rows_are_forgotten_has_no_time_left():
    given = []
    class Slow:
        async def call(self, peer_id, method, meta, tensors, *, timeout, **how):
            given.append(timeout)
            if len(given) > 1: return {}, []
            await trio.sleep(2.)
            raise Refused(peer_id, method, 'forgotten', 'Forgotten')
    async def main():
        async with scene() as (server, _, _): await _say(Slow(), asks(server)[1], 1., 'none')
    simulate(main)
    assert given == [1., 0.]


def test_what_one_has_sent_another_does_not_find_and_nonsense_is_refused():
    async def main():
        async with scene() as (server, roster, _):
            forward, backward = asks(server)
            await make_calls(roster.network, roster, [forward], **PLENTY)
            stranger = server.network.hub.peer()
            async def call(meta, tensors, network=roster.network):
                return await network.call(server.network.peer_id, 'call.backward', backward.meta | meta, tensors, timeout=5.)
            for wrong, tensors, network, why in [
                    ({}, [GRAD, WEIGHTS], stranger, 'forgotten'), ({'kept': b'other'}, [GRAD, WEIGHTS], roster.network, 'forgotten'),
                    ({'kept': 'these rows'}, [GRAD, WEIGHTS], roster.network, 'kept'), ({'kept': bytes(33)}, [GRAD, WEIGHTS], roster.network, 'forgotten'),
                    ({'counts': [1, 1]}, [GRAD, WEIGHTS], roster.network, 'this call brings'), ({}, [GRAD[:2], WEIGHTS], roster.network, 'this call brings'),
                    ({}, [ROWS, INDEX, GRAD, WEIGHTS], roster.network, 'this call brings')]:
                with pytest.raises(Refused, match=why): await call(wrong, tensors, network)
            assert [expert.updates for expert in server.experts.values()] == [0, 0] and len(server._kept) == 1
            await call({}, [GRAD, WEIGHTS])
            assert [expert.updates for expert in server.experts.values()] == [1, 1]
    simulate(main)
