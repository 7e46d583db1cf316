"Peers that are neither alive nor dead, each a process of its own: they cost a trainer no more than silence does."
import os, signal, socket, statistics, time

import pytest, torch
from conftest import freeze

from lah_nb import DMoE, Swarm
from lah_nb.mixture.classes import Schema
from lah_nb.mixture.roster import index_entries

pytestmark = pytest.mark.slow

EXPERT = '''
import ctypes, os, time
from pathlib import Path
import torch
from lah_nb import register_expert

ORDERS = Path(__file__).with_suffix('.orders')

def obey():
    "Whoever is named there does what is said there"
    try: pid, order = ORDERS.read_text().split()
    except (OSError, ValueError): return
    if int(pid) != os.getpid(): return
    if order == 'hang':
        while ORDERS.exists(): time.sleep(0.05)
    if order == 'hold': ctypes.PyDLL(None).sleep(12)  # as C code does that never lets go of the GIL

@register_expert('moody', example=lambda hidden_dim: torch.zeros(2, hidden_dim))
class Moody(torch.nn.Linear):
    def __init__(self, hidden_dim): super().__init__(hidden_dim, hidden_dim)
    def forward(self, x):
        obey()
        return super().forward(x)
'''
WIDTH, SECONDS = 16, 12.


class Scene:
    "A swarm of four, and a layer that is trained on it"
    def __init__(self, folder):
        self.file = folder / 'moody.py'
        self.file.write_text(EXPERT)
        self.orders = self.file.with_suffix('.orders')
        self.swarm = Swarm.local(peers=4, experts='moody.[0:16]', expert_cls='moody', hidden_dim=WIDTH, expert_file=str(self.file), copies=0)
        self.layer = DMoE(self.swarm, WIDTH, grid=(16,), uid_prefix='moody', k=4)

    def step(self):
        began = time.monotonic()
        self.layer(torch.randn(16, WIDTH, requires_grad=True)).sum().backward()
        return time.monotonic() - began

    def stall(self, begin):
        "Seconds beyond those of ordinary steps, from `begin()` on"
        for _ in range(10): self.step()
        usual = statistics.median(self.step() for _ in range(20))
        begin()
        until, steps = time.monotonic() + SECONDS, []
        while time.monotonic() < until: steps.append(self.step())
        return sum(seconds - usual for seconds in steps if seconds > 5 * usual)

    @property
    def troubles(self):
        "Calls so far that failed, or that others stood in for"
        told = self.layer.stats.totals()
        return told['failed_calls'] + told['hedged_calls']

    def order(self, pid, what):
        part = self.orders.with_suffix('.part')
        part.write_text(f'{pid} {what}')
        part.replace(self.orders)


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    with scene.swarm: yield scene
    scene.orders.unlink(missing_ok=True)


@pytest.mark.parametrize('how', ['stopped', 'hang', 'hold'])
def test_a_peer_that_answers_pings_and_nothing_else(scene, how):
    "`stopped`: it does not even do that; `hang`: its device thread waits for ever; `hold`: a thread of it holds the GIL"
    victim = scene.swarm.peers[0].pid
    begin = (lambda: freeze(victim)) if how == 'stopped' else lambda: scene.order(victim, how)
    try:
        assert scene.stall(begin) < 3
        assert scene.troubles > 0  # it has not answered
        assert scene.layer.last.answered == 64  # for each of 16 rows four others are found
    finally:
        os.kill(victim, signal.SIGCONT)
        scene.orders.unlink(missing_ok=True)


def test_a_host_that_never_ends_a_handshake(scene):
    "It is in the index, its port is open, and nobody says a word there"
    uids = [f'moody.{i}' for i in range(8)]
    with socket.create_server(('127.0.0.1', 0)) as mute:
        def claim():
            with Swarm.join(scene.swarm.addrs[0]) as liar:
                addr = f'/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{liar.network.peer_id}'
                liar.portal.run(liar.dht.announce, index_entries(uids, Schema((WIDTH,), (WIDTH,)), [addr]))
        assert scene.stall(claim) < 3
        mute.settimeout(0)
        mute.accept()  # it was believed, and dialled
        assert scene.layer.last.answered == 64
