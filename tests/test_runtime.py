"The runtime under simulated time, and with its real thread"
import math
import threading
from time import perf_counter

import pytest
import torch
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lah_nb.mixture import BadGradient, Expert, ExpertError, Late, Overloaded, Runtime, RuntimeStopped

torch.set_num_threads(1)


class Recorder:
    "Stands where an expert stands, and writes down what was run together"
    expert_cls, hidden_dim, refused, updates = 'recorder', 1, 0, 0

    def __init__(self, uid, log): self.uid, self.log = uid, log
    def check(self, x, grad=None): pass
    def forward_batch(self, parts):
        self.log.append((self.uid, 'forward', [len(x) for x, _ in parts]))
        return [x for x, _ in parts]
    def backward_batch(self, parts):
        self.log.append((self.uid, 'backward', [len(x) for x, *_ in parts]))
        return [grad for _, grad, *_ in parts]


def rows(n): return torch.zeros(n, 1)


def simulate(scene, experts=4, seconds=1.0, **options):
    "Run `scene(runtime, nursery, log)` in virtual time; one trip takes `seconds`"
    log = []
    async def execute(fn):
        await trio.sleep(seconds)
        return fn()
    async def main():
        async with trio.open_nursery() as nursery:
            runtime = Runtime({f'e.{i}': Recorder(f'e.{i}', log) for i in range(experts)}, execute=execute, **options)
            await nursery.start(runtime.run)
            async with trio.open_nursery() as callers: await scene(runtime, callers, log)
            nursery.cancel_scope.cancel()
        return runtime
    return trio.run(main, clock=MockClock(autojump_threshold=0)), log


async def call(runtime, uid, n=1, kind='forward', patience=math.inf):
    return (await runtime.submit(kind, [(uid, rows(n), rows(n), 0)], trio.current_time() + patience))[0]


def test_oldest_first_and_batched():
    async def scene(runtime, callers, log):
        for uid in ('e.0', 'e.2', 'e.1', 'e.2', 'e.2'):  # the first trip leaves with e.0 alone
            callers.start_soon(call, runtime, uid)
            await wait_all_tasks_blocked()
    _, log = simulate(scene)
    assert log == [('e.0', 'forward', [1]), ('e.2', 'forward', [1, 1, 1]), ('e.1', 'forward', [1])]


def test_a_batch_is_bounded_and_nobody_starves():
    "A caller that floods one expert delays another expert's caller by a trip, not by the flood"
    async def scene(runtime, callers, log):
        for _ in range(30): callers.start_soon(call, runtime, 'e.0', 4)
        await wait_all_tasks_blocked()
        start = trio.current_time()
        await call(runtime, 'e.1')
        assert trio.current_time() - start <= 3
    runtime, log = simulate(scene, max_batch_size=10)
    assert max(sum(sizes) for _, _, sizes in log) <= 10 and runtime.served_rows == 121 and runtime.queued_rows == 0


def test_forward_and_backward_have_lines_of_their_own():
    async def scene(runtime, callers, log):
        callers.start_soon(call, runtime, 'e.3')
        await wait_all_tasks_blocked()
        for kind in ('forward', 'backward', 'forward', 'backward'): callers.start_soon(call, runtime, 'e.0', 1, kind)
        await wait_all_tasks_blocked()
    _, log = simulate(scene)
    assert sorted(log[1:]) == [('e.0', 'backward', [1, 1]), ('e.0', 'forward', [1, 1])]


def test_late_requests_are_not_run():
    answers = []
    async def scene(runtime, callers, log):
        callers.start_soon(call, runtime, 'e.0')
        await wait_all_tasks_blocked()
        start = trio.current_time()
        answers.append(await call(runtime, 'e.1', kind='backward', patience=0.25))
        assert trio.current_time() - start == 0.25 and runtime.queued_rows == 0
        answers.append(await call(runtime, 'e.1', patience=-1))
    runtime, log = simulate(scene)
    assert [type(a) for a in answers] == [Late, Late] and [uid for uid, *_ in log] == ['e.0'] and runtime.dropped == 2


def test_a_caller_who_leaves_takes_his_rows_along():
    async def scene(runtime, callers, log):
        callers.start_soon(call, runtime, 'e.0')
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.5): await call(runtime, 'e.1', 7)
        assert runtime.queued_rows == 0 and not runtime._lines
    _, log = simulate(scene)
    assert [uid for uid, *_ in log] == ['e.0']


def test_full_queue_turns_away_at_once():
    async def scene(runtime, callers, log):
        callers.start_soon(call, runtime, 'e.0', 5)
        await wait_all_tasks_blocked()
        callers.start_soon(call, runtime, 'e.1', 8)
        await wait_all_tasks_blocked()
        start = trio.current_time()
        with pytest.raises(Overloaded, match='8 rows wait'): await call(runtime, 'e.2', 3)
        assert trio.current_time() == start
        await call(runtime, 'e.2', 2)
    simulate(scene, max_queued_rows=10)


def test_an_expert_may_leave_while_rows_wait():
    answers = []
    async def scene(runtime, callers, log):
        callers.start_soon(call, runtime, 'e.0')
        await wait_all_tasks_blocked()
        async def waiter(): answers.append(await call(runtime, 'e.1'))
        callers.start_soon(waiter)
        await wait_all_tasks_blocked()
        del runtime.experts['e.1']
    simulate(scene)
    assert isinstance(answers[0], ExpertError) and 'has left' in str(answers[0])


def test_stop_tells_who_waits():
    answers = []
    async def main():
        async with trio.open_nursery() as outer:
            runtime = Runtime({'e.0': Recorder('e.0', [])}, execute=lambda fn: trio.sleep_forever())
            async with trio.open_nursery() as nursery:
                await nursery.start(runtime.run)
                async def waiter(): answers.append(await call(runtime, 'e.0'))
                for _ in range(3): outer.start_soon(waiter)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        with pytest.raises(RuntimeStopped): await call(runtime, 'e.0')
        return runtime
    runtime = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert [type(a) for a in answers] == [RuntimeStopped] * 3 and runtime.queued_rows == 0


def test_a_trip_ends_when_its_time_is_up():
    "What a trip had no time for goes first on the next, and in order"
    async def scene(runtime, callers, log):
        for i in range(4): callers.start_soon(call, runtime, f'e.{i}')
        await wait_all_tasks_blocked()
    runtime, log = simulate(scene, trip=(32, -1.0))
    assert runtime.trips == 4 and sorted(log) == [(f'e.{i}', 'forward', [1]) for i in range(4)]


def with_thread(scene, experts):
    async def main():
        async with trio.open_nursery() as nursery:
            runtime = Runtime(experts)
            await nursery.start(runtime.run)
            result = await scene(runtime)
            nursery.cancel_scope.cancel()
        return result
    result = trio.run(main)
    assert 'lah-device' not in [thread.name for thread in threading.enumerate()]
    return result


def test_real_thread_many_callers_equal_one_module():
    experts = {f'ffn.{i}': Expert(f'ffn.{i}', 'ffn', 8) for i in range(3)}
    async def scene(runtime):
        async def trainer():
            for _ in range(5):
                x = torch.randn(2, 8)
                y = await runtime.submit('forward', [(uid, x, None, 0) for uid in experts], trio.current_time() + 10)
                for uid, output in zip(experts, y): torch.testing.assert_close(output, experts[uid].module(x).detach(), atol=1e-5, rtol=1e-5)
        async with trio.open_nursery() as nursery:
            for _ in range(6): nursery.start_soon(trainer)
        return runtime.stats()
    stats = with_thread(scene, experts)
    assert stats['served_rows'] == 6 * 5 * 3 * 2 and stats['batches'] < 6 * 5 * 3 and stats['queued_rows'] == 0 and stats['rows_per_second'] > 0


def test_real_thread_one_bad_caller_costs_the_others_nothing():
    experts = {'ffn.0': Expert('ffn.0', 'ffn', 8)}
    async def scene(runtime):
        x, grad = torch.randn(1, 8), torch.randn(1, 8)
        parts = [('ffn.0', x, grad, 0), ('ffn.0', x, grad * math.nan, 0), ('ffn.0', x, grad[:, :2], 0), ('ffn.7', x, grad, 0), ('ffn.0', x, None, 0)]
        return await runtime.submit('backward', parts, trio.current_time() + 10)
    good, nan, shape, uid, missing = with_thread(scene, experts)
    assert good.shape == (1, 8) and isinstance(nan, BadGradient) and 'cannot be' in str(shape) and 'not hosted' in str(uid) and 'needs the gradient' in str(missing)
    assert experts['ffn.0'].updates == 1


def test_loop_answers_while_the_device_works():
    "The network's loop is not held up by a long batch"
    expert = Expert('ffn.0', 'ffn', 8)
    release = threading.Event()
    expert.forward_batch = lambda parts: [release.wait(5)] and [x for x, _ in parts]
    async def scene(runtime):
        async with trio.open_nursery() as nursery:
            async def caller(): await runtime.submit('forward', [('ffn.0', torch.ones(1, 8), None, 0)], trio.current_time() + 10)
            nursery.start_soon(caller)
            start = perf_counter()
            for _ in range(10): await trio.sleep(0.001)
            ticks = perf_counter() - start
            release.set()
        return ticks
    assert with_thread(scene, {'ffn.0': expert}) < 2


def test_errors_in_the_callers_task_end_the_thread():
    async def scene(runtime): raise ZeroDivisionError
    with pytest.raises(BaseException) as raised: with_thread(scene, {'ffn.0': Expert('ffn.0', 'ffn', 8)})
    assert raised.group_contains(ZeroDivisionError)
    assert 'lah-device' not in [thread.name for thread in threading.enumerate()]


def test_an_optimizer_step_has_few_rows_of_several_callers():
    "Forward calls are merged as they come; each backward part would like a step of its own"
    async def scene(runtime, callers, log):
        callers.start_soon(call, runtime, 'e.3')
        await wait_all_tasks_blocked()
        for kind in ('forward', 'backward'):
            for n in (6, 6, 6, 20): callers.start_soon(call, runtime, 'e.0', n, kind)
        await wait_all_tasks_blocked()
    _, log = simulate(scene, max_step_rows=16)
    assert sorted(map(sorted, (rows for _, kind, rows in log if kind == 'backward'))) in ([[6], [6, 6], [20]], [[6, 6], [6], [20]])
    assert [sum(rows) for _, kind, rows in log[1:] if kind == 'forward'] == [38]


def test_callers_take_turns_and_one_that_is_greedy_starves_nobody():
    "Not even within a line; and half of the queue is for others"
    waited = {}
    async def send(runtime, caller, n):
        start = trio.current_time()
        await runtime.submit('forward', [('e.0', rows(n), None, 0)], math.inf, caller=caller)
        waited.setdefault(caller, []).append(trio.current_time() - start)
    async def scene(runtime, callers, log):
        for _ in range(50): callers.start_soon(send, runtime, 'greedy', 10)
        await wait_all_tasks_blocked()
        with pytest.raises(Overloaded, match='of yours'): await send(runtime, 'greedy', 30)
        for _ in range(5):  # one after another
            await send(runtime, 'modest', 2)
    runtime, log = simulate(scene, max_batch_size=20, max_queued_rows=1000)
    assert max(waited['modest']) <= 2 and max(waited['greedy']) >= 25
    assert len(waited['greedy']) == 50 and not runtime.queued_rows and not runtime._waiting
