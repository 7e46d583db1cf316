"Starting, joining, volunteering; children that die with their kernel; experts of one's own."
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest, torch
from conftest import freeze, until

import lah_nb
from lah_nb import DMoE, Swarm, SwarmError, volunteer
from lah_nb.mixture.copies import fetch_packed
from lah_nb.mixture.packed import read_packed
from lah_nb.mixture.replicas import distance

pytestmark = pytest.mark.slow

KERNEL = '''
import time
from lah_nb import Swarm
swarm = Swarm.local(peers=2, experts='ffn.[0:4]', hidden_dim=16)
print(*(p.pid for p in swarm.peers), flush=True)
time.sleep(100)
'''


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_children_die_with_their_kernel(how):
    kernel = subprocess.Popen([sys.executable, '-c', KERNEL], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = list(map(int, kernel.stdout.readline().split()))
    assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
    kernel.send_signal(how)
    kernel.wait(20)
    kernel.stdout.close()
    gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not alive


def test_closing_twice_and_using_after():
    swarm = Swarm.local(peers=1, experts='ffn.[0:2]', hidden_dim=16)
    swarm.close(), swarm.close()
    assert repr(swarm) == 'Swarm(closed)'
    with pytest.raises(SwarmError, match='closed'): swarm.snapshot()


def test_a_peer_that_cannot_start_says_why():
    with pytest.raises(SwarmError, match='could not start: no class of experts is called .nonesuch.'): Swarm.local(peers=1, experts='ffn.[0:2]', expert_cls='nonesuch')
    with pytest.raises(SwarmError, match='cannot be spread'): Swarm.local(peers=3, experts='ffn.[0:2]')


def test_experts_of_ones_own_from_a_file(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('import torch\nfrom lah_nb.mixture.classes import register_expert\n@register_expert("twice", example=lambda hidden_dim: torch.zeros(2, hidden_dim))\n'
                    'class Twice(torch.nn.Module):\n    def __init__(self, hidden_dim):\n        super().__init__()\n        self.w = torch.nn.Parameter(torch.tensor(2.))\n    def forward(self, x): return self.w * x\n')
    with Swarm.local(peers=1, experts='mine.[0:3]', expert_cls='twice', hidden_dim=8, expert_file=str(path)) as swarm:
        x = torch.randn(4, 8)
        torch.testing.assert_close(DMoE(swarm, 8, grid=(3,), uid_prefix='mine', k=2)(x), 2 * x)


def test_replicas_take_over():
    "The same uids on two peers: when one dies, every expert is still there"
    with Swarm.local(peers=1, experts='ffn.[0:4]', hidden_dim=16) as swarm:
        help = volunteer(swarm.addrs[0], experts=4, listen='/ip4/127.0.0.1/tcp/0')
        try:
            layer = DMoE(swarm, 16, grid=(4,), k=4)
            deadline = time.monotonic() + 40
            while len(swarm.roster.hosts_of('ffn.0')) < 2 and time.monotonic() < deadline:
                layer(torch.randn(8, 16))
                time.sleep(0.2)
            assert len(swarm.roster.hosts_of('ffn.0')) == 2
            swarm.peers[0].kill()
            for _ in range(3): layer(torch.randn(8, 16, requires_grad=True)).sum().backward()
            assert layer.last.experts == 4 and layer.last.answered == 32 and not layer.last.failed
        finally: help.stop()


def test_replicas_in_processes_of_their_own_meet():
    "Taught different things, two hosts of one expert have the same weights a few seconds later, and count each update once"
    uid = 'ffn.0'
    with Swarm.local(peers=1, experts=uid, hidden_dim=16, copies=0) as swarm:
        swarm.start_peers(1, uid, hidden_dim=16, copies=0)
        peers, call = [peer.peer_id for peer in swarm.peers], swarm.network.call
        async def teach(peer_id, seed):
            g = torch.Generator().manual_seed(seed)
            for n in range(60):
                tensors = [torch.randn(4, 16, generator=g), torch.arange(4, dtype=torch.int32), torch.ones(4, 16), torch.ones(4)]
                await call(peer_id, 'call.backward', {'uids': [uid], 'counts': [4], 'seed': 0, 'id': b'%d %d' % (seed, n)}, tensors, timeout=10.)
        async def state(peer_id): return read_packed((await fetch_packed(swarm.network, peer_id, uid))[0])[1]
        def updates(): return [int(swarm.portal.run(state, peer_id)['updates']) for peer_id in peers]
        for lesson in range(2):
            before = swarm.portal.run(state, peers[0])
            for seed, peer_id in enumerate(peers): swarm.portal.run(teach, peer_id, 2 * lesson + seed)
            until(lambda: distance(*[swarm.portal.run(state, peer_id) for peer_id in peers]) <= 1e-6)
            assert distance(before, swarm.portal.run(state, peers[0])) > 0.01
        # before their first meeting nobody knew of the other's; and each meeting, of which there is one for 20 updates at most, may add one
        assert updates()[0] == updates()[1] and 120 < updates()[0] <= 240 + 240 // 20


def test_a_snapshot_shows_the_silent():
    with Swarm.local(peers=2, experts='ffn.[0:4]', hidden_dim=16) as swarm:
        assert sum(p['alive'] for p in swarm.snapshot().peers) == 2
        freeze(swarm.peers[0].pid)
        snapshot = swarm.snapshot()
        assert sum(p['alive'] for p in snapshot.peers) == 1 and len(snapshot.peers) == 2
        os.kill(swarm.peers[0].pid, signal.SIGCONT)


def test_a_cell_that_is_run_again_closes_its_old_swarm():
    code = """
import os, sys, psutil
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
run = lambda cell: shell.run_cell(cell, store_history=True).raise_error()
me = psutil.Process()
children = lambda: len(me.children(recursive=True)) - len(me.children())  # what their forges have forked
run('from lah_nb import Swarm')
for text in ("swarm = Swarm.local(1, 'e.[0:2]', hidden_dim=4)", "# edited\\nswarm = Swarm.local(1, 'e.[0:3]', hidden_dim=4)"):
    run(text)
    assert children() == 1, children()
run("other = Swarm.local(1, 'e.[0:2]', hidden_dim=4)\\nother = Swarm.local(1, 'e.[0:2]', hidden_dim=4)")
assert children() == 3, children()
"""
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
    assert not said.returncode and said.stderr.count('held before is closed') == 1, said.stdout + said.stderr


def test_peers_are_forked_and_end_with_what_forks_them():
    with Swarm.local(2, 'e.[0:4]', hidden_dim=4) as swarm:
        first, second = swarm.peers
        forge = psutil.Process(first.pid).parent()
        assert forge.pid == psutil.Process(second.pid).ppid() and psutil.Process(os.getpid()) == forge.parent()
        first.kill()
        assert not psutil.pid_exists(first.pid) and first.process.returncode == -signal.SIGKILL and second.alive
        forge.kill()
        until(lambda: not second.alive, 5.)
        third, = swarm.start_peers(1, 'e.[0:4]')  # from another forge
        assert third.alive and psutil.Process(third.pid).ppid() != forge.pid


def test_a_peer_whose_code_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / 'lah_nb').mkdir()
    shutil.copytree(Path(lah_nb.__file__).parent, tmp_path / 'lah_nb', dirs_exist_ok=True)
    with open(tmp_path / 'lah_nb' / 'mixture' / 'server.py', 'a') as file: file.write("\nimport os\nif os.getsid(0) == os.getpid(): raise RuntimeError('a broken installation')\n")
    code = f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom lah_nb import Swarm\nSwarm.local(2, "e.[0:4]", hidden_dim=4)'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert said.returncode == 1 and 'RuntimeError: a broken installation' in said.stderr, said.stderr


def test_a_clone_on_the_path_is_enough(tmp_path):
    (tmp_path / 'clone').mkdir()
    (tmp_path / 'lah_nb.py').write_text('raise RuntimeError("another one, in the present folder")')
    shutil.copytree(Path(lah_nb.__file__).parent, tmp_path / 'clone' / 'lah_nb')
    code = (f'import sys\nsys.path.insert(0, {str(tmp_path / "clone")!r})\nimport lah_nb\nfrom lah_nb import Swarm\n'
            'assert "clone" in lah_nb.__file__\nwith Swarm.local(1, "e.0", hidden_dim=4) as s: print(open(f"/proc/{s.peers[0].pid}/environ").read())')
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert str(tmp_path / 'clone') in said.stdout, said.stderr
