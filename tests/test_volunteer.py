"A computer lent with one cell: what it chooses, who it is, how it pauses, comes back and leaves."
import json, os, signal, socket, subprocess, sys, time

import psutil, pytest, torch
from conftest import until

from lah_nb.swarm import LocalPeer
from lah_nb import DMoE, Swarm, SwarmError, volunteer
from lah_nb.mixture import Expert
from lah_nb.mixture.copies import fetch_state
from lah_nb.network import AddressError, Peer, load_identity, peer_id_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
HERE = dict(listen='/ip4/127.0.0.1/tcp/0')

KERNEL = '''
import sys, time, psutil
from lah_nb import volunteer
def lend(): return volunteer(sys.argv[1], 2, listen='/ip4/127.0.0.1/tcp/0')
def children(): return len(psutil.Process().children(recursive=True))
'''


@pytest.fixture
def half(tmp_path):
    "A peer with half of a grid of eight"
    peer = LocalPeer('--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16')
    try:
        peer.wait_ready()
        yield peer
    finally: peer.stop()


@pytest.fixture
def kernel(tmp_path):
    "Starts kernels that all belong to the same user"
    started = []
    def start(code, addr):
        p = subprocess.Popen([sys.executable, '-c', KERNEL + code, addr], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, 'XDG_DATA_HOME': str(tmp_path)})
        started.append(p)
        return p
    yield start
    for p in started:
        p.kill()
        p.wait()
        p.stdin.close(), p.stdout.close()


def served(swarm, peer_id) -> list:
    "What a peer hosts, as the records say"
    found = swarm.portal.run(lambda: swarm.dht.get([f'experts/ffn.{i}' for i in range(2)], max_age=0.))
    return sorted(f'{key[8:]}.{record.subkey}' for key, records in found.items() for record in records if record.author == peer_id)


def test_what_nobody_hosts_comes_first_then_the_hottest(half, tmp_path):
    with Swarm.join(half.addrs[0]) as swarm:
        with volunteer(half.addrs[0], 4, identity=tmp_path / 'a', **HERE) as one:
            assert not set(one.status()['uids']) & set(served(swarm, half.peer_id)) and len(one.status()['uids']) == 4
            layer = DMoE(swarm, 16, grid=(2, 4), k=1, balance=False)
            for parameter in layer.gate.parameters(): torch.nn.init.zeros_(parameter)
            x = torch.randn(64, 16)
            for _ in range(5): layer(x).sum().backward()
            hottest, = {uid for uid, rows in layer.stats.snapshot()['served'].items() if rows > 200}
            with volunteer([half.addrs[0], one.peer.addrs[0]], 1, identity=tmp_path / 'b', **HERE) as two:
                assert two.status()['uids'] == [hottest]
                def weights(peer_id):
                    expert = Expert(hottest, 'ffn', 16)
                    swarm.portal.run(lambda: fetch_state(swarm.network, peer_id, expert))
                    return expert.updates, expert.flat
                swarm.network.learn(two.peer_id, two.peer.addrs)
                (n, theirs), (m, ours) = (weights(peer_id) for peer_id in (half.peer_id if hottest in served(swarm, half.peer_id) else one.peer_id, two.peer_id))
                assert n == m > 0 and torch.equal(theirs, ours)  # not the first weights of the expert, but what it has become
                assert two.status()['updates'] == 0  # that was others' work


def test_what_a_dead_peer_hosted_is_taken_at_once(half, tmp_path):
    "Its records live on for half a minute"
    with LocalPeer_(half) as other, Swarm.join(half.addrs[0]) as swarm:
        lost = served(swarm, other.peer_id)
        other.kill()
        with volunteer(half.addrs[0], 4, identity=tmp_path / 'a', **HERE) as vol: assert len(lost) == 4 and vol.status()['uids'] == lost


class LocalPeer_:
    "The other half"
    def __init__(self, half): self.peer = LocalPeer('--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16', '--join', half.addrs[0])
    def __enter__(self):
        self.peer.wait_ready()
        return self.peer
    def __exit__(self, *exc): self.peer.stop()


def test_the_cell_again_is_the_same_volunteer_and_a_new_kernel_the_same_peer(half, kernel):
    code = 'vol = lend()\nassert lend() is vol\nprint(vol.peer_id, vol.pid, flush=True)\nsys.stdin.read()'
    first = kernel(code, half.addrs[0])
    peer_id, pid = first.stdout.readline().split()
    second = kernel(code, half.addrs[0])
    assert second.stdout.readline().split()[0] != peer_id  # two at a time are two peers
    first.kill()
    third = kernel(code, half.addrs[0])  # while the first one's child may still be leaving
    assert third.stdout.readline().split()[0] == peer_id
    until(lambda: not psutil.pid_exists(int(pid)))


def test_the_child_dies_with_its_kernel(half, kernel):
    process = kernel('vol = lend()\nprint(vol.pid, flush=True)\ntime.sleep(100)', half.addrs[0])
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


@pytest.mark.parametrize('after', [0.01, 1.0, 3.0])
def test_an_interrupt_while_it_starts_leaves_nothing(half, kernel, after):
    process = kernel('print("on", flush=True)\nwhile True:\n  try:\n    vol = lend()\n    print("up", children(), flush=True)\n    sys.stdin.read()\n    break\n  except KeyboardInterrupt: print("interrupted", children(), flush=True)', half.addrs[0])
    assert process.stdout.readline() == 'on\n'
    time.sleep(after)  # any moment will do
    process.send_signal(signal.SIGINT)
    lines = [process.stdout.readline() for _ in range(2)]
    if lines[0].startswith('up'): lines = [*lines, process.stdout.readline()][1:]  # it was up already
    assert lines == ['interrupted 0\n', 'up 1\n'] or lines == ['interrupted 1\n', 'up 1\n'], lines


def test_pausing_takes_the_records_back_and_resuming_announces_them(half, tmp_path):
    with Swarm.join(half.addrs[0]) as swarm, volunteer(half.addrs[0], 4, identity=tmp_path / 'id', **HERE) as vol:
        mine = vol.status()['uids']
        layer = DMoE(swarm, 16, grid=(2, 4), k=8)
        assert served(swarm, vol.peer_id) == mine and until(lambda: layer(torch.randn(4, 16)) is not None and layer.last.experts == 8)
        vol.pause()
        assert vol.status()['state'] == 'paused' and not served(swarm, vol.peer_id)
        rows = vol.status()['rows']
        assert until(lambda: layer(torch.randn(4, 16)) is not None and layer.last.experts == 4)
        time.sleep(1.5)  # longer than it takes to tell
        assert vol.status()['rows'] <= rows + 40 and vol.alive
        vol.resume()
        assert vol.status()['state'] == 'connected' and until(lambda: served(swarm, vol.peer_id) == mine)
        assert until(lambda: layer(torch.randn(4, 16)) is not None and layer.last.experts == 8)
        assert until(lambda: vol.status()['rank']) in (1, 2) and until(lambda: vol.status()['rows'] > rows)
        assert 'connected' in vol._repr_html_() and '4 experts of ffn.[0:2].[0:4]' in repr(vol)


def test_it_comes_back_when_the_swarm_does(tmp_path):
    "The only other peer is killed, and later one is at its place again; the experts have unlearnt nothing meanwhile"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    def start():
        peer = LocalPeer('--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16', '--identity', str(tmp_path / 'boot'), '--listen', f'/ip4/127.0.0.1/tcp/{port}')
        peer.wait_ready()
        return peer
    boot = start()
    try:
        with volunteer(boot.addrs[0], 4, identity=tmp_path / 'id', **HERE) as vol:
            with Swarm.join(boot.addrs[0]) as swarm:
                layer = DMoE(swarm, 16, grid=(2, 4), k=8)
                until(lambda: layer(torch.randn(4, 16)).sum().backward() is None and layer.last.experts == 8)
                meta, _ = swarm.portal.run(lambda: swarm.network.call(vol.peer_id, 'call.status', {}, timeout=10.))
            made = sum(numbers[0] for numbers in meta['experts'].values())
            assert made and (before := until(lambda: (s := vol.status())['updates'] == made and s))  # it is told once a second
            boot.kill()
            until(lambda: vol.status()['state'] == 'rejoining')
            boot = start()
            until(lambda: vol.status()['state'] == 'connected')
            after = vol.status()
            assert after['peer_id'] == before['peer_id']
            assert after['updates'] >= before['updates']  # more, if it has adopted what the killed peer had taught
            # it may have adopted more: the peer that came back chose its experts anew
            with Swarm.join(boot.addrs[0]) as swarm: assert until(lambda: set(before['uids']) <= set(served(swarm, vol.peer_id)))
            assert set(before['uids']) <= set(vol.status()['uids'])
    finally: boot.stop()


def test_errors_in_the_users_words(half, tmp_path):
    with pytest.raises(AddressError, match='dns4.localhost'): volunteer('localhost:4001')
    with pytest.raises(SwarmError, match="(?s)no grid of experts called 'nonesuch'"): volunteer(half.addrs[0], prefix='nonesuch', identity=tmp_path / 'id', **HERE)
    with Peer() as gone: addr = gone.addrs[0]
    start = time.monotonic()
    with pytest.raises(SwarmError, match='(?s)nobody answered at'): volunteer(addr, identity=tmp_path / 'id', **HERE)
    assert time.monotonic() - start < 60


def test_leaving_withdraws_at_once(half, tmp_path):
    with Swarm.join(half.addrs[0]) as swarm:
        vol = volunteer(half.addrs[0], 4, identity=tmp_path / 'id', **HERE)
        assert served(swarm, vol.peer_id)
        vol.stop(), vol.stop()
        assert not served(swarm, vol.peer_id) and vol.status()['state'] == 'stopped' and not psutil.pid_exists(vol.pid)
        assert peer_id_of(load_identity(tmp_path / 'id')) == vol.peer_id


def test_a_person_at_a_terminal_can_do_it_too(half, tmp_path):
    command = [sys.executable, '-c', 'import sys; from lah_nb.command.cli import main; sys.exit(main())', 'peer', '--volunteer', '--join', half.addrs[0], '--num-experts', '3', '--identity', str(tmp_path / 'id'), '--json']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith('ready /ip4/')
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and json.loads(out.splitlines()[-1])['experts'] == 3
