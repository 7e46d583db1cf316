"Experts outlive the peers that host them: checkpoints, copies on other peers, adoption, hand-over, collection."
import os, subprocess, sys

import pytest, torch, trio, trio.testing

from lah_nb.mixture.experts import Expert, expert_path, load_expert, save_expert
from lah_nb.mixture.runtime import Runtime
from lah_nb.mixture.server import Server
from lah_nb.network import DHT, MemoryHub


def simulate(afn): return trio.run(afn, clock=trio.testing.MockClock(autojump_threshold=0))


async def inline(fn): return fn()


def learn(expert, steps=1):
    for _ in range(steps): expert.backward(torch.ones(2, expert.hidden_dim), torch.ones(2, expert.hidden_dim))


def quick(uid, **options): return Expert(uid, 'ffn', 8, **options)


def serve(dht, experts, **options):
    held = {expert.uid: expert for expert in experts}
    return Server(dht.network, dht, experts, runtime=Runtime(held, execute=inline), **options)


def test_only_experts_that_changed_are_written_after_a_minute_or_a_thousand_updates(tmp_path, monkeypatch):
    written = []
    def note(expert, folder, tensors=None):
        written.append((round(trio.current_time() - start), expert.uid))
        return save_expert(expert, folder, tensors)
    monkeypatch.setattr('lah_nb.mixture.server.save_expert', note)
    async def now(fn, *args, **kw): return fn(*args)
    monkeypatch.setattr(trio.to_thread, 'run_sync', now)
    async def main():
        nonlocal start
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            dht = DHT(hub.peer(), clock=trio.current_time)
            await nursery.start(dht.run)
            a, b = quick('ffn.0'), quick('ffn.1')
            start = trio.current_time()
            server = serve(dht, [a, b], checkpoint_dir=tmp_path)
            await nursery.start(server.run)
            await trio.sleep(70)
            assert sorted(written) == [(60, 'ffn.0'), (60, 'ffn.1')]
            learn(a)
            await trio.sleep(70)
            assert [uid for _, uid in written[2:]] == ['ffn.0']
            b.updates += 1000
            await trio.sleep(2)
            assert [uid for _, uid in written[3:]] == ['ffn.1']
            nursery.cancel_scope.cancel()
    start = 0.
    simulate(main)
    assert len(written) == 4  # nothing was left to write on leaving


def test_a_full_disk_does_not_stop_the_serving(tmp_path, monkeypatch, caplog):
    tried = []
    def full(*args):
        tried.append(trio.current_time())
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('lah_nb.mixture.server.save_expert', full)
    async def now(fn, *args, **kw): return fn(*args)
    monkeypatch.setattr(trio.to_thread, 'run_sync', now)
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            dht = DHT(hub.peer(), clock=trio.current_time)
            await nursery.start(dht.run)
            server = serve(dht, [quick('ffn.0')], checkpoint_dir=tmp_path)
            await nursery.start(server.run)
            server.experts['ffn.0'].updates = 5000
            await trio.sleep(100)
            x = torch.ones(2, 8)
            answer, = await server.runtime.submit('forward', [('ffn.0', x, None, 0)], trio.current_time() + 5)
            assert isinstance(answer, torch.Tensor)
            nursery.cancel_scope.cancel()
    simulate(main)
    assert 2 <= len(tried) <= 4 and 'No space left' in caplog.text


def test_a_writer_killed_midway_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    expert = quick('ffn.0')
    learn(expert)
    save_expert(expert, tmp_path)
    code = '''
import os, signal, sys
from lah_nb.mixture.experts import write_durably
from pathlib import Path
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
write_durably(Path(sys.argv[1]), b'half')'''
    subprocess.run([sys.executable, '-c', code, str(expert_path(tmp_path, 'ffn.0'))])
    assert len(list(tmp_path.glob('.*.part'))) == 1
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            dht = DHT(hub.peer(), clock=trio.current_time)
            await nursery.start(dht.run)
            server = serve(dht, [quick('ffn.0')], checkpoint_dir=tmp_path)
            await nursery.start(server.run)
            assert server.experts['ffn.0'].updates == 1
            nursery.cancel_scope.cancel()
    trio.run(main)
    assert [path.name for path in tmp_path.iterdir()] == ['ffn.0.safetensors']
    assert load_expert(quick('ffn.0'), tmp_path)
