"Computers that can only dial out, for real: network namespaces behind routers that masquerade and let nobody in."
import json, os, queue, shutil, signal, subprocess, sys, threading, time

import pytest
from conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LAH = [sys.executable, '-c', 'import sys; from lah_nb.command.cli import main; sys.exit(main())']
PUBLIC, DEADLINE = '203.0.113.1', 5.  # seconds of a trainer's call

# the cell, in a kernel; what it then knows, when it is asked
VOLUNTEER = '''
import json, sys, time
start = time.monotonic()
from lah_nb import volunteer
vol = volunteer(sys.argv[1], 4, identity=sys.argv[2])
print(json.dumps({'start': start, 'peer_id': vol.peer_id}), flush=True)
for line in sys.stdin:
    if line.strip() == 'leave': vol.stop()
    print(json.dumps({**vol.status(), 'log': vol.log()}), flush=True)
'''

TRAINER = '''
import json, sys, time, torch
from lah_nb import DMoE, Swarm
torch.set_num_threads(1)
with Swarm.join(sys.argv[1]) as swarm:
    layer = DMoE(swarm, 16, grid=(2, 4), k=8, forward_timeout=DEADLINE, backward_timeout=DEADLINE, zeros_if_too_few=True)
    while True:
        before = dict(layer.stats.snapshot()['served'])
        layer(torch.randn(8, 16, requires_grad=True)).sum().backward()
        served, last = layer.stats.snapshot()['served'], layer.last
        kinds = {str(peer): sorted({c.get_connection_type().name for c in found}) for peer, found in swarm.network._host.get_network().get_connections_map().items()}
        links = {peer: [l.stream.swarm_conn.get_connection_type().name] for (peer, protocol), l in list(swarm.network._links.items()) if protocol == 'call'}
        print(json.dumps({'at': time.monotonic(), 'served': [uid for uid in served if served[uid] > before.get(uid, 0)], 'seconds': [last.seconds, last.backward_seconds], 'failed': last.failed, 'kinds': kinds, 'links': links}), flush=True)
        time.sleep(0.05)
'''.replace('DEADLINE', str(DEADLINE))


def run(command: str, *, check=True): return subprocess.run(command.split(), check=check, capture_output=True, text=True, timeout=20)


def why_not() -> str:
    "Why this computer cannot have such a network; empty if it can"
    if sys.platform != 'linux' or os.geteuid(): return 'network namespaces need Linux and root'
    if not shutil.which('ip'): return 'needs `ip` (Debian: iproute2)'
    if not (shutil.which('nft') or shutil.which('iptables')): return 'needs `nft` or `iptables` for a router that masquerades (Debian: nftables)'
    name = f'lahtry{os.getpid()}'
    try: run(f'ip netns add {name}')
    except subprocess.CalledProcessError as error: return f'no network namespace can be made here: {error.stderr.strip()}'
    finally: run(f'ip netns del {name}', check=False)
    return ''


class Net:
    "`i`: where everybody can be dialled; `v` and `t`: two homes with the same private addresses, behind the routers `rv` and `rt`"
    def __init__(self, punchable: bool = False):  # the routers keep the port of a connection, as most at home do; or each connection has another
        self.punchable = punchable
        self.names, self.processes = {name: f'lah{os.getpid()}{name}' for name in ('i', 'rv', 'v', 'rt', 't')}, []

    def ip(self, where: str, *commands: str):
        for command in commands: run(f'ip -n {self.names[where]} {command}')

    def up(self):
        for name in self.names.values(): run(f'ip netns add {name}')
        for where in self.names: self.ip(where, 'link set lo up')
        self.ip('i', f'addr add {PUBLIC}/32 dev lo')
        self.inside('i', 'sysctl -qw net.ipv4.ip_forward=1')
        for n, (router, home) in enumerate((('rv', 'v'), ('rt', 't'))): self._home(router, home, n)

    def _home(self, router: str, home: str, n: int):
        run(f'ip link add wan netns {self.names[router]} type veth peer name {router} netns {self.names["i"]}')
        run(f'ip link add lan netns {self.names[router]} type veth peer name eth0 netns {self.names[home]}')
        self.ip('i', f'addr add 198.51.100.{4 * n + 1}/30 dev {router}', f'link set {router} up')
        self.ip(router, f'addr add 198.51.100.{4 * n + 2}/30 dev wan', 'addr add 192.168.1.1/24 dev lan', 'link set wan up', 'link set lan up', f'route add default via 198.51.100.{4 * n + 1}')
        self.ip(home, 'addr add 192.168.1.2/24 dev eth0', 'link set eth0 up', 'route add default via 192.168.1.1')
        self.inside(router, 'sysctl -qw net.ipv4.ip_forward=1')
        if shutil.which('nft'):
            rules = 'table ip lah { chain out { type nat hook postrouting priority 100; oifname "wan" masquerade RANDOM; }; chain through { type filter hook forward priority 0; policy drop; ct state established,related accept; iifname "lan" accept; }; chain own { type filter hook input priority 0; iifname "wan" ct state new drop; }; }'.replace('RANDOM', '' if self.punchable else 'random')
            subprocess.run(['ip', 'netns', 'exec', self.names[router], 'nft', rules], check=True, capture_output=True, timeout=20)
        else:
            for rule in '-t nat -A POSTROUTING -o wan -p tcp -j MASQUERADE' + ' --random' * (not self.punchable), '-P FORWARD DROP', '-A FORWARD -m state --state ESTABLISHED,RELATED -j ACCEPT', '-A FORWARD -i lan -j ACCEPT', '-A INPUT -i wan -m state --state NEW -j DROP': self.inside(router, f'iptables {rule}')

    def inside(self, where: str, command: str): return run(f'ip netns exec {self.names[where]} {command}')

    def start(self, where: str, *command: str):
        "A process inside, and a queue with the lines that it prints"
        p = subprocess.Popen(['ip', 'netns', 'exec', self.names[where], *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        lines = queue.Queue()
        reader = threading.Thread(target=lambda: [lines.put(line) for line in p.stdout], name='lines', daemon=True)
        reader.start()
        self.processes.append((p, reader))
        return p, lines

    def peer(self, *options: str):
        "A peer that everybody can dial; (process, address, peer id)"
        p, lines = self.start('i', *LAH, 'peer', '--owned', '--listen', f'/ip4/{PUBLIC}/tcp/0', *options)
        addr = lines.get(timeout=60).split()[1]
        return p, addr, addr.rpartition('/')[2]

    def down(self):
        for p, _ in self.processes: p.stdin.close()
        for p, reader in self.processes:
            try: p.wait(10)
            except subprocess.TimeoutExpired: p.kill()
            p.wait()
            reader.join(5)
            p.stdout.close()
        for name in self.names.values(): run(f'ip netns del {name}', check=False)


@pytest.fixture
def net(request):
    if why := why_not(): pytest.skip(why)
    net = Net(punchable=getattr(request, 'param', False))
    try:
        net.up()
        yield net
    finally: net.down()


class Steps:
    "What the trainer tells of its batches"
    def __init__(self, lines): self.lines, self.all = lines, []

    def until(self, condition, timeout=60.) -> dict:
        "The first batch from now on that fulfils a condition"
        while not self.lines.empty(): self.all.append(json.loads(self.lines.get()))
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try: self.all.append(json.loads(self.lines.get(timeout=left)))
            except queue.Empty: break
            if condition(self.all[-1]): return self.all[-1]
        raise AssertionError(f'not within {timeout:g} s; the last batches: {self.all[-3:]}')


def ask(process, lines, command='status'):
    print(command, file=process.stdin, flush=True)
    return json.loads(lines.get(timeout=30))


def test_nobody_gets_in(net):
    "The network is what the other test takes it for"
    assert net.inside('v', f'ping -c 1 -W 2 {PUBLIC}' if shutil.which('ping') else f'{sys.executable} -c 1')
    listener, lines = net.start('v', sys.executable, '-c', 'import socket, sys; s = socket.create_server(("0.0.0.0", 4001)); print("on", flush=True); sys.stdin.read()')
    assert lines.get(timeout=20)
    for where in 'i', 't':
        for ip in '192.168.1.2', '198.51.100.2':
            got = subprocess.run(['ip', 'netns', 'exec', net.names[where], sys.executable, '-c', f'import socket; socket.create_connection(("{ip}", 4001), timeout=1.5)'], capture_output=True, timeout=20)
            assert got.returncode, f'{where} reached {ip}'


def test_experts_behind_a_nat_are_trained_and_survive_their_relays(net, tmp_path):
    _, addr, _ = net.peer('--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16')
    relays = [net.peer('--relay', '--join', addr) for _ in range(2)]
    trainer, lines = net.start('t', sys.executable, '-c', TRAINER, addr)
    steps = Steps(lines)
    public = set(steps.until(lambda step: len(step['served']) == 4)['served'])
    hidden = lambda step: set(step['served']) - public

    volunteer, told = net.start('v', sys.executable, '-c', VOLUNTEER, addr, str(tmp_path / 'id.key'))
    born = json.loads(told.get(timeout=60))
    through = lambda: {addr.split('/p2p/')[1].partition('/')[0] for addr in ask(volunteer, told)['addrs']}
    first = steps.until(hidden)
    status = until(lambda: (s := ask(volunteer, told))['updates'] and s)
    print(f'trained by {first["at"] - born["start"]:.1f} s after the cell began')
    assert status['reach'] == 'relay'
    assert first['at'] - born['start'] < 45  # 15 on a machine that has nothing else to do
    steps.until(lambda step: len(step['served']) == 8)
    until(lambda: through() == {id for _, _, id in relays})

    for how in signal.SIGKILL, signal.SIGSTOP:  # each of the two in turn, a fresh one in its place
        dead, _, gone = relays.pop(0)
        dead.send_signal(how)
        killed = time.monotonic()
        steps.until(lambda step: step['at'] > killed + 0.5 and not step['failed'] and hidden(step))
        print(f'trained again {steps.all[-1]["at"] - killed:.1f} s after a relay got {how.name}')
        until(lambda: gone not in through())
        print(f'its addresses are without it after {time.monotonic() - killed:.1f} s')
        relays.append(net.peer('--relay', '--join', addr))
        until(lambda: through() == {id for _, _, id in relays})
    for relay, _, _ in relays: relay.kill()  # both at once, and later there is a new one
    killed = time.monotonic()
    net.peer('--relay', '--join', addr)
    ready = time.monotonic()
    steps.until(lambda step: step['at'] > killed + 0.5 and hidden(step), timeout=90)
    print(f'trained again {steps.all[-1]["at"] - ready:.1f} s after a new relay came, {steps.all[-1]["at"] - killed:.1f} s after both were killed')

    steps.until(lambda step: len(step['served']) == 8, timeout=90)
    assert ask(volunteer, told, 'leave')['state'] == 'stopped'
    left = time.monotonic()
    steps.until(lambda step: step['at'] > left + 5 and len(step['served']) == 8)  # its experts were handed over
    waits = [(step['at'], seconds) for step in steps.all for seconds in step['seconds'] if seconds is not None]
    print(f'longest wait of {len(waits)} calls: {max(s for _, s in waits):.2f} s; after leaving: {max(s for at, s in waits if at > left):.2f} s')
    assert max(s for _, s in waits) < DEADLINE + 1


@pytest.mark.parametrize('net', [True], indirect=True)
def test_where_the_nats_allow_it_the_relay_is_only_an_introduction(net, tmp_path):
    "Both ends dial at once (DCUtR): from then on rows take the direct way, and no relay is needed"
    _, addr, _ = net.peer('--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16')
    relay, _, _ = net.peer('--relay', '--join', addr)
    trainer, lines = net.start('t', sys.executable, '-c', TRAINER, addr)
    steps = Steps(lines)
    steps.until(lambda step: len(step['served']) == 4)
    volunteer, told = net.start('v', sys.executable, '-c', VOLUNTEER, addr, str(tmp_path / 'id.key'))
    peer_id = json.loads(told.get(timeout=60))['peer_id']
    first = steps.until(lambda step: len(step['served']) == 8)
    direct = steps.until(lambda step: step['links'].get(peer_id) == ['DIRECT'])
    print(f'direct {direct["at"] - first["at"]:.1f} s after the first rows')
    relay.kill()
    killed = time.monotonic()
    steps.until(lambda step: step['at'] > killed + 5)
    assert all(len(step['served']) == 8 and not step['failed'] for step in steps.all if step['at'] > direct['at']), [step['failed'] for step in steps.all if step['failed']]
