"Calls over real sockets: quick, bounded, calm with hostile and silent peers. Pitfalls of py-libp2p 0.8 each have a test."
import asyncio, os, signal, socket, struct, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil, pytest, torch, trio
from conftest import freeze, until
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux import yamux

from lah_nb.network import AddressError, CallTimeout, Host, Peer, Refused, Unreachable, chunks, circuit_addrs, new_identity, pack, peer_id_of, split_addr
from lah_nb.network.host import _protocol_id
from lah_nb.network.link import tuned
from lah_nb.network.relay import reserve
from lah_nb.errors import LahError
from lah_nb.network.wire import REQUEST

ECHO = '''
import sys, time, trio
from lah_nb.network import Peer
async def echo(request): return request.meta, request.tensors
async def sleep(request): await trio.sleep_forever()
peer = Peer()
peer.serve('call.echo', echo), peer.serve('call.sleep', sleep)
print(peer.addrs[0], flush=True)
sys.stdin.read()
'''


async def echo(request): return request.meta, request.tensors


@pytest.fixture
def pair():
    with Peer() as a, Peer() as b:
        for peer in a, b: peer.serve('call.echo', echo)
        b.connect(a.addrs[0])
        yield a, b


@contextmanager
def running(code):
    "A process of its own that runs this, and the first line that it prints"
    process = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try: yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close(), process.stdin.close()


@pytest.fixture
def other_process():
    "A peer in a process of its own, to be stopped and killed"
    with running(ECHO) as about: yield about


IMPORTS = '''
import sys, threading
from importlib.abc import MetaPathFinder
class Note(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'torch': print(threading.current_thread().name, flush=True)
sys.meta_path.insert(0, Note())
'''


def test_the_first_tensors_of_a_process_do_not_hold_it_up():
    "torch takes seconds to import, and a peer that is silent for four is given up by who waits for it"
    with running(IMPORTS + ECHO) as (process, addr), Peer() as peer:
        id = peer.connect(addr)
        meta, (y,) = peer.call(id, 'call.echo', {'n': 1}, [x := torch.randn(10)], timeout=60)
        assert meta == {'n': 1} and torch.equal(x, y)
        assert not process.stdout.readline().startswith('lah-')  # the thread of the event loop


def test_from_threads_and_asyncio(pair):
    a, b = pair
    x = torch.randn(100)
    with ThreadPoolExecutor(16) as pool: results = list(pool.map(lambda i: b.call(a.peer_id, 'call.echo', {'i': i}, [x + i], timeout=20), range(64)))
    for i, (meta, (y,)) in enumerate(results): assert meta == {'i': i} and torch.equal(y, x + i)
    async def several(): return await asyncio.gather(*(b.acall(a.peer_id, 'call.echo', {'i': i}, timeout=20) for i in range(20)))
    assert [meta['i'] for meta, _ in asyncio.run(several())] == list(range(20))


def test_cancelled_asyncio_cell_cancels_the_call(pair):
    a, b = pair
    ended = threading.Event()
    async def sleep(request):
        try: await trio.sleep_forever()
        finally: ended.set()
    a.serve('call.sleep', sleep)
    async def cell():
        task = asyncio.create_task(b.acall(a.peer_id, 'call.sleep', timeout=60))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
    asyncio.run(cell())
    assert ended.wait(5)  # the handler at the far end was told
    assert b.call(a.peer_id, 'call.echo', {'n': 1}, timeout=5)[0] == {'n': 1}


@pytest.mark.slow
def test_giving_up_in_the_middle_of_a_write_leaves_the_connection_whole(pair):
    "py-libp2p: cancelling a write corrupts the connection for all its streams; ours is never cancelled"
    a, b = pair
    big = torch.zeros(8 << 20)
    for _ in range(3):
        with pytest.raises(CallTimeout): b.call(a.peer_id, 'call.echo', {}, [big], timeout=0.02)
        assert torch.equal(b.call(a.peer_id, 'call.echo', {}, [torch.arange(5)], timeout=20)[1][0], torch.arange(5))
    assert torch.equal(b.call(a.peer_id, 'call.echo', {}, [big], timeout=30)[1][0], big)


@pytest.mark.slow
def test_small_calls_pass_large_ones(pair):
    a, b = pair
    b.call(a.peer_id, 'call.echo', {}, timeout=20)
    order = []
    def call(name, n):
        b.call(a.peer_id, 'call.echo', {}, [torch.zeros(n)], timeout=60)
        order.append(name)
    large = threading.Thread(target=call, args=('large', 32 << 20))
    large.start()
    time.sleep(0.05)
    call('small', 10)
    large.join(60)
    assert order == ['small', 'large']


@pytest.mark.slow
def test_full_duplex(pair):
    "py-libp2p's mplex deadlocks here, which is why only Yamux is offered"
    a, b = pair
    big = torch.zeros(4 << 20)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(x.call, y.peer_id, 'call.echo', {}, [big], timeout=60) for x, y in ((a, b), (b, a)) for _ in range(2)]
        for future in futures: assert len(future.result(90)[1][0]) == 4 << 20


def test_a_peer_with_no_address_is_called_over_its_own_connection():
    with Peer() as a, Peer(listen=()) as b:
        b.serve('call.echo', echo)
        b.connect(a.addrs[0])
        assert b.addrs == [] and a.call(b.peer_id, 'call.echo', {'n': 1}, timeout=10)[0] == {'n': 1}


@pytest.mark.slow
def test_a_stopped_peer_is_noticed_and_no_call_outlives_its_deadline(other_process):
    "py-libp2p keeps a stopped peer connected for over 45 s"
    process, addr = other_process
    with Peer(listen=()) as b:
        peer_id = b.connect(addr, timeout=20)
        b.call(peer_id, 'call.echo', {}, timeout=20)
        freeze(process.pid)
        start = time.monotonic()
        with pytest.raises(CallTimeout): b.call(peer_id, 'call.echo', {}, timeout=0.5)
        assert time.monotonic() - start < 1.5
        start = time.monotonic()
        with pytest.raises(Unreachable, match='silent'): b.call(peer_id, 'call.echo', {}, timeout=30)
        assert time.monotonic() - start < 6
        os.kill(process.pid, signal.SIGCONT)
        assert b.call(peer_id, 'call.echo', {'n': 2}, timeout=20)[0] == {'n': 2}  # dialled again


@pytest.mark.slow
def test_a_slow_handler_is_not_silence(other_process):
    process, addr = other_process
    with Peer(listen=()) as b:
        peer_id = b.connect(addr, timeout=20)
        with pytest.raises(CallTimeout): b.call(peer_id, 'call.sleep', {}, timeout=6)


@pytest.mark.slow
def test_a_killed_peer_fails_its_callers_at_once(other_process):
    process, addr = other_process
    with Peer(listen=()) as b:
        peer_id = b.connect(addr, timeout=20)
        threading.Timer(0.5, process.kill).start()
        start = time.monotonic()
        with pytest.raises(Unreachable): b.call(peer_id, 'call.sleep', {}, timeout=30)
        assert time.monotonic() - start < 4


def test_a_failed_dial_is_not_held_against_the_peer_for_a_minute():
    identity = new_identity()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with Peer(listen=()) as b:
        addr = f'/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id_of(identity)}'
        with pytest.raises(Unreachable, match='cannot connect'): b.connect(addr, timeout=10)
        with Peer(listen=[f'/ip4/127.0.0.1/tcp/{port}'], identity=identity): assert b.connect(addr, timeout=10)


@pytest.mark.slow
def test_a_connection_comes_about_quickly():
    "py-libp2p's happy eyeballs wait 250 ms before the first dial"
    def seconds(a):
        with Peer(listen=()) as b:
            start = time.monotonic()
            b.connect(a.addrs[0], timeout=10)
            return time.monotonic() - start
    with Peer() as a: assert min(seconds(a) for _ in range(4)) < 0.2


def test_frames_fill_one_noise_message():
    assert yamux.MAX_MESSAGE_SIZE + 16 == 65535


def test_peers_nobody_asked_for_are_not_dialled(pair):
    "py-libp2p's auto-connector dials whoever it has heard of"
    a, b = pair
    with Peer() as c:
        b.host.learn(c.peer_id, c.addrs)
        b.portal.run(lambda: b.host._host.get_network().auto_connector.maybe_connect())
        assert c.peer_id not in b.host.connected()


@pytest.mark.slow
def test_shutdown_is_quick_with_many_connections():
    "py-libp2p closes one after another, 0.2 s each"
    with Peer() as a:
        others = [Peer(listen=()) for _ in range(12)]
        for other in others: other.connect(a.addrs[0], timeout=20)
        start = time.monotonic()
        a.close()
        assert time.monotonic() - start < 2
        for other in others: other.close()
    assert not [t for t in threading.enumerate() if t.name.startswith('lah-')]


def sockets(): return sorted((c.status, c.laddr) for c in psutil.Process().net_connections())


def test_a_closed_peer_leaves_no_socket_open():
    before = sockets()
    for _ in range(3):
        with Peer() as a, Peer() as b:
            a.serve('call.echo', echo)
            b.connect(a.addrs[0])
            b.call(a.peer_id, 'call.echo')
            assert len(sockets()) > len(before)
        assert sockets() == before
    with Peer() as a: port = a.addrs[0].split('/')[4]
    with Peer(listen=[f'/ip4/127.0.0.1/tcp/{port}']) as again: assert again.addrs[0].split('/')[4] == port


def test_a_host_that_is_cancelled_while_it_begins_ends():
    async def main():
        for after in 0., 0.001, 0.003, 0.006, 0.01, 0.02, 0.04:
            host = Host(listen=['/ip4/127.0.0.1/tcp/0'])
            with trio.move_on_after(after): await host.run()
    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_a_connection_that_has_ended_is_let_go():
    "libp2p counts each one that came against a limit of 2,000, as long as the host runs"
    with Peer() as a:
        a.host._host.get_network()._inbound_limiter = limit = trio.CapacityLimiter(2)
        for _ in range(6):
            with Peer() as b: b.connect(a.addrs[0])
            until(lambda: not limit.borrowed_tokens, 5)
        async def tasks():
            def below(task): return 1 + sum(below(child) for nursery in task.child_nurseries for child in nursery.child_tasks)
            return below(trio.lowlevel.current_root_task())
        with Peer() as b: b.connect(a.addrs[0])
        until(lambda: not limit.borrowed_tokens, 5)
        calm = a.portal.run(tasks)
        for _ in range(5):
            with Peer() as b: b.connect(a.addrs[0])
        until(lambda: a.portal.run(tasks) <= calm, 10)


def test_garbage_instead_of_a_handshake(pair):
    a, b = pair
    port = int(a.addrs[0].split('/')[4])
    for data in b'GET / HTTP/1.1\r\n\r\n', os.urandom(4096), b'':
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.sendall(data)
            time.sleep(0.05)
    half_open = socket.create_connection(('127.0.0.1', port))  # says nothing, stays
    assert b.call(a.peer_id, 'call.echo', {'n': 1}, timeout=5)[0] == {'n': 1}
    half_open.close()


@pytest.mark.parametrize('data', [os.urandom(5000), struct.pack('!BQIIQ', REQUEST, 1, 12, 10, 4 << 30), struct.pack('!BQI', REQUEST, 1, 2**31)], ids=['garbage', 'claims 4 GiB', 'claims a 2 GiB chunk'])
def test_garbage_on_our_own_protocol_costs_the_sender_its_stream_only(pair, data):
    a, b = pair
    async def attack():
        stream = await b.host._host.new_stream(ID.from_base58(a.peer_id), [_protocol_id('call')])
        await stream.write(data)
        with trio.fail_after(5):
            try:
                while await stream.read(1000): pass
            except Exception as error: return type(error).__name__
        return 'closed'
    assert b.portal.run(attack)
    assert b.call(a.peer_id, 'call.echo', {'n': 1}, timeout=5)[0] == {'n': 1}


def test_a_request_that_is_cut_off_is_not_an_answer(pair):
    a, b = pair
    async def cut():
        stream = await b.host._host.new_stream(ID.from_base58(a.peer_id), [_protocol_id('call')])
        whole = b''.join(bytes(x) for c in chunks(REQUEST, 1, pack({'m': 'call.echo', 't': 5., 'a': {}}, [torch.zeros(1000)])) for x in c)
        await stream.write(whole[:500])
        await stream.reset()
    b.portal.run(cut)
    assert b.call(a.peer_id, 'call.echo', {'n': 1}, timeout=5)[0] == {'n': 1}


def test_refusals_and_bugs_at_the_far_end(pair):
    a, b = pair
    async def bug(request): raise KeyError('secret detail')
    async def no(request): raise LahError('not today')
    a.serve('call.bug', bug), a.serve('call.no', no)
    with pytest.raises(Refused, match='KeyError in the handler') as refused: b.call(a.peer_id, 'call.bug')
    assert 'secret' not in str(refused.value)
    with pytest.raises(Refused, match='not today'): b.call(a.peer_id, 'call.no')
    with pytest.raises(Refused, match='does not serve'): b.call(a.peer_id, 'call.nothing')


def test_identity_is_kept_in_a_file(tmp_path):
    path = tmp_path / 'deep' / 'id.key'
    with Peer(identity=path) as a: first = a.peer_id
    with Peer(identity=path) as a: assert a.peer_id == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_addresses_in_the_users_words():
    for wrong in 'localhost:4001', '/ip4/127.0.0.1/tcp/4001', '/ip4/1.2.3.4/tcp/x', '': 
        with pytest.raises(AddressError): split_addr(wrong)


def test_a_port_in_use_is_said_so():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        with pytest.raises(LahError, match='another program has that port'): Peer(listen=[f'/ip4/127.0.0.1/tcp/{s.getsockname()[1]}'])
    with Peer() as a:  # libp2p would share the port between the two
        with pytest.raises(LahError, match='another program has that port'): Peer(listen=['/'.join(a.addrs[0].split('/')[:5])])


def test_a_relay_carries_calls_between_peers_that_cannot_dial_each_other():
    "By libp2p's circuit relay v2: a peer behind a NAT keeps a reservation, another reaches it through the relay"
    from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
    from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID, STOP_PROTOCOL_ID, CircuitV2Protocol
    from libp2p.relay.circuit_v2.transport import CircuitV2Transport
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr
    with Peer(relay=True) as relay, Peer(listen=()) as hidden, Peer(listen=()) as caller:
        hidden.serve('call.echo', echo)
        for peer in hidden, caller: peer.connect(relay.addrs[0], timeout=20)
        async def story():
            async with trio.open_nursery() as nursery:
                transports = []
                for peer in hidden, caller:
                    protocol = CircuitV2Protocol(peer.host._host)
                    await nursery.start(_service, background_trio_service(protocol))
                    peer.host._host.set_stream_handler(STOP_PROTOCOL_ID, protocol._handle_stop_stream)
                    transports.append(CircuitV2Transport(peer.host._host, protocol, RelayConfig(roles=RelayRole.STOP | RelayRole.CLIENT)))
                stream = await hidden.host._host.new_stream(ID.from_base58(relay.peer_id), [PROTOCOL_ID])
                assert await transports[0].reserve(stream, ID.from_base58(relay.peer_id), nursery)
                await transports[1].dial(Multiaddr(f'{relay.addrs[0]}/p2p-circuit/p2p/{hidden.peer_id}'))
                meta, (y,) = await caller.host.call(hidden.peer_id, 'call.echo', {'n': 1}, [torch.arange(1 << 20)], timeout=20)
                nursery.cancel_scope.cancel()
                return meta, len(y)
        async def _service(manager, task_status):
            async with manager:
                task_status.started()
                await trio.sleep_forever()
        assert relay.portal.run(story, timeout=60) == ({'n': 1}, 1 << 20)


@pytest.fixture
def hidden():
    "A peer that nobody can dial, with a reservation on each of two relays; and the addresses where it is reached"
    with Peer(relay=True) as a, Peer(relay=True) as b, Peer(listen=()) as hidden:
        hidden.serve('call.echo', echo)
        addrs = []
        for relay in a, b:
            hidden.connect(relay.addrs[0], timeout=20)
            hidden.host.relays.add(relay.peer_id)
            hidden.portal.run(reserve, hidden.host._host, ID.from_base58(relay.peer_id), timeout=20)
            addrs += circuit_addrs(relay.peer_id, relay.addrs, hidden.peer_id)
        yield hidden, (a, b), addrs


def test_circuits_by_our_own_hand(hidden):
    "Called by its address alone, from peers that never met the relays; one caller's leaving does not touch another's circuit; there is none to who has not asked for a place"
    hidden, relays, addrs = hidden
    with Peer(listen=()) as stays:
        stays.connect(addrs[0], timeout=20)
        with Peer(listen=()) as leaves:
            leaves.connect(addrs[0], timeout=20)
            assert torch.equal(leaves.call(hidden.peer_id, 'call.echo', {}, [torch.arange(1 << 20)], timeout=20)[1][0], torch.arange(1 << 20))
        link = stays.host._links[hidden.peer_id, 'dht']
        assert stays.call(hidden.peer_id, 'dht.ping', timeout=10)[0] == {} and link is stays.host._links[hidden.peer_id, 'dht'] and link.alive
        with Peer(listen=()) as other, pytest.raises(Unreachable, match='no_reservation'): other.connect(circuit_addrs(relays[0].peer_id, relays[0].addrs, stays.peer_id)[0], timeout=20)


def test_another_relay_takes_over(hidden):
    hidden, relays, addrs = hidden
    with Peer(listen=()) as caller:
        caller.host.learn(hidden.peer_id, addrs)
        assert caller.call(hidden.peer_id, 'call.echo', {'n': 1}, timeout=20)[0] == {'n': 1}
        for relay in relays:
            if relay.peer_id in caller.host.connected(): relay.close()
        deadline = time.monotonic() + 20
        while True:
            try: answer, _ = caller.call(hidden.peer_id, 'call.echo', {'n': 2}, timeout=5)
            except Unreachable:
                if time.monotonic() > deadline: raise
            else: break
        assert answer == {'n': 2}


def test_circuits_through_strangers_are_refused(hidden):
    hidden, relays, addrs = hidden
    hidden.host.relays.clear()
    with Peer(listen=()) as caller, pytest.raises(Unreachable, match='connection_failed'): caller.connect(addrs[0], timeout=20)


def test_addresses_that_are_none_are_refused_and_nothing_ends():
    "What a stranger says of where a peer is may be anything that begins with a slash"
    with Peer() as a:
        with pytest.raises(AddressError, match='address that is none'): a.host.learn(a.peer_id, ['/no/such/protocol'])


def test_a_peer_is_dialled_by_name_and_announces_what_its_owner_says():
    with Peer(announce=['/dns4/localhost/tcp/4001']) as a, Peer(listen=()) as b:
        a.serve('call.echo', echo)
        assert a.addrs == [f'/dns4/localhost/tcp/4001/p2p/{a.peer_id}']
        port = a.host.listening[0].split('/')[4]
        for name in 'dns4', 'dns':
            b.connect(f'/{name}/localhost/tcp/{port}/p2p/{a.peer_id}')
            assert b.call(a.peer_id, 'call.echo', {'n': 1})[0] == {'n': 1}
            b.portal.run(lambda: b.host.drop(a.peer_id))
        nobody = peer_id_of(new_identity())
        with pytest.raises(Unreachable, match='the name nowhere.invalid cannot be resolved'):
            b.connect(f'/dns4/nowhere.invalid/tcp/1/p2p/{nobody}')


def test_an_address_of_long_ago_does_not_stand_in_the_way():
    "The peer moved: what is learnt last is tried, with what was known, and names are resolved anew"
    with Peer() as a, Peer(listen=()) as b:
        for port in range(9, 60): b.host.learn(a.peer_id, [f'/ip4/127.0.0.1/tcp/{port}'])
        b.connect(a.addrs[0])
        assert len(b.host.where.known[a.peer_id]) < 30


def test_a_computer_that_listens_everywhere_prints_loopback_last():
    with Peer(listen=['/ip4/0.0.0.0/tcp/0']) as peer:
        loopback = ['/127.' in addr for addr in peer.addrs]
        assert loopback == sorted(loopback) and any(loopback) and '0.0.0.0' not in str(peer.addrs)
    if socket.has_ipv6 and any('::1' in str(a) for card in psutil.net_if_addrs().values() for a in card):
        with Peer(listen=['/ip6/::/tcp/0']) as peer, Peer(listen=()) as caller:
            assert peer.addrs and not any('/ip6/::/' in addr for addr in peer.addrs)
            caller.connect(peer.addrs[-1])


NO_NAMESERVER = '''
import dns.resolver
def read(*args): raise dns.resolver.NoResolverConfiguration('no nameservers')
dns.resolver.BaseResolver.read_resolv_conf = dns.resolver.BaseResolver.read_registry = read
import lah_nb.swarm.lending
from lah_nb.network import Peer
with Peer() as a, Peer(listen=()) as b: print(b.connect(a.addrs[0]))
'''


def test_without_a_nameserver_all_but_names_works():
    done = subprocess.run([sys.executable, '-c', NO_NAMESERVER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_copied_identity_is_noticed_and_the_first_one_stays(tmp_path):
    command = [sys.executable, '-m', 'lah_nb', 'peer', '--identity']
    def start(file, *options): return subprocess.Popen([*command, tmp_path / file, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = start('a')
    try:
        addr = first.stdout.readline().split()[1]
        (tmp_path / 'b').write_bytes((tmp_path / 'a').read_bytes())
        second = start('b', '--join', addr)
        assert 'is in use' in second.communicate(timeout=30)[1] and second.returncode == 1
        with Peer(listen=()) as peer: peer.connect(addr)
    finally:
        first.kill()
        first.communicate()
