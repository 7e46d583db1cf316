"The monitor and the panels on real peers: joins, silence, death, and buttons"
import os, signal, time

import psutil, pytest, torch
from conftest import freeze

from lah_nb import DMoE, Swarm, SwarmError

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


def states(told): return {peer['peer_id']: peer['state'] for peer in told['peers']}


def test_joins_silence_and_death_are_seen():
    with Swarm.local(peers=2, experts='ffn.[0:2].[0:4]', hidden_dim=16) as swarm:
        first, second = swarm.peers
        watch = lambda peer, state: swarm.monitor.wait(lambda told: states(told).get(peer.peer_id) == state, timeout=15)
        assert states(watch(first, 'alive'))[first.peer_id] == 'alive' and states(watch(second, 'alive'))[second.peer_id] == 'alive'
        freeze(first.pid)
        began = time.monotonic()
        told = watch(first, 'silent')
        assert states(told)[first.peer_id] == 'silent' and time.monotonic() - began < 6
        os.kill(first.pid, signal.SIGCONT)
        assert states(watch(first, 'alive'))[first.peer_id] == 'alive'
        third, = swarm.start_peers(1, 'ffn.[2:3].[0:4]', hidden_dim=16)
        assert states(watch(third, 'alive'))[third.peer_id] == 'alive' and swarm.monitor.wait(lambda told: told['experts'] == 12)['experts'] == 12
        second.kill()
        began = time.monotonic()
        assert states(watch(second, 'gone'))[second.peer_id] == 'gone' and time.monotonic() - began < 6
        third.stop()
        assert states(watch(third, 'gone'))[third.peer_id] == 'gone'


def test_load_calls_and_history():
    with Swarm.local(peers=2, experts='ffn.[0:2].[0:4]', hidden_dim=16) as swarm:
        layer = DMoE(swarm, 16, grid=(2, 4), k=2)
        swarm.monitor.read()
        deadline = time.monotonic() + 20
        while len(swarm.monitor.history) < 4 and time.monotonic() < deadline: layer(torch.randn(16, 16, requires_grad=True)).sum().backward()
        told = swarm.monitor.read()
        assert sum(told['rates'].values()) > 0 and told['own'] == swarm.network.peer_id
        assert {peer.peer_id for peer in swarm.peers} <= told['calls'].keys() and all(begun > 0 for _, begun in told['calls'].values())
        last = swarm.monitor.history[-1]
        assert sum(last['served'].values()) > 100 and last['peers'].keys() == {peer.peer_id for peer in swarm.peers}
        uid = max(last['served'], key=last['served'].get)
        seen = swarm.monitor.expert(uid)
        assert seen['rows'][-1] == last['served'][uid] and seen['rows'] == sorted(seen['rows']) and seen['updates'][-1] > 0 and seen['grad_norm'][-1] > 0


def test_it_asks_nobody_when_nobody_looks(monkeypatch):
    monkeypatch.setattr('lah_nb.swarm.monitor.READ_FOR', 0.5)
    with Swarm.local(peers=1, experts='ffn.[0:4]', hidden_dim=16) as swarm:
        swarm.monitor.wait(lambda told: told['experts'] == 4)
        time.sleep(2.5)
        moments = len(swarm.monitor._moments)
        time.sleep(2)
        assert len(swarm.monitor._moments) == moments and not swarm.monitor._asking


def test_peers_that_cannot_start_leave_nothing():
    with Swarm.local(peers=1, experts='ffn.[0:4]', hidden_dim=16) as swarm:
        with pytest.raises(SwarmError, match='no_such_class'): swarm.start_peers(2, 'ffn.[4:8]', expert_cls='no_such_class', timeout=40)
        assert len(swarm.local_peers) == 1 and len(psutil.Process().children()) == 1


def test_the_panel_says_what_went_wrong():
    from lah_nb import PeerPanel
    panel = PeerPanel()
    panel.addr.value = '/ip4/127.0.0.1/tcp/9'
    panel.join_button.click()
    assert panel.wait(30) and '/p2p/' in panel.status.value and panel.swarm is None
    panel.uids.value = 'nonsense'
    panel.start_button.click()
    assert panel.wait(30) and 'nonsense' in panel.status.value and panel.swarm is None


def test_the_panel_joins_and_adds():
    from lah_nb import PeerPanel
    with Swarm.local(peers=1, experts='ffn.[0:4]', hidden_dim=16) as swarm:
        panel = PeerPanel()
        panel.addr.value = swarm.addrs[0]
        panel.join_button.click()
        assert panel.wait(30) and panel.swarm is not None
        with panel.swarm as joined:
            panel.count.value, panel.uids.value, panel.hidden_dim.value = 1, 'ffn.[4:8]', 16
            panel.start_button.click()
            assert panel.wait(60) and swarm.monitor.wait(lambda told: told['experts'] == 8, timeout=15)['experts'] == 8
            assert swarm.addrs[0] not in panel.line.text and joined.local_peers[0].addrs[0] in panel.line.text
            row = panel._rows[joined.local_peers[0]]
            row.show_log()
            assert 'ready' in panel.said.value
            row.buttons[1].click()
            assert panel.wait(20) and not joined.local_peers[0].alive
