"The way past libp2p between two peers of one computer: taken when it pays, left alone when anything about it is wrong"
import os, signal, socket, sys, time
from concurrent.futures import ThreadPoolExecutor

import pytest, torch, trio
from conftest import freeze, until

from lah_nb.network import Peer, Refused, Unreachable
from lah_nb.network import host as host_module, shortcut
from lah_nb.network.shortcut import TICKET, Way
from test_peer import echo, other_process, pair

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='abstract sockets are Linux only')
ROWS = [torch.randn(64, 64)]


def streams(peer, other): return [type(link.stream) for (who, _), link in peer.host._links.items() if who == other]
def way(peer, other): return Way in streams(peer, other)


def use(peer, other, calls=20):
    for _ in range(calls): peer.call(other, 'call.echo', {}, ROWS, timeout=10)


def drawn(peer, other):
    "Use a link until it is a shortcut"
    def shortened():
        use(peer, other)
        return way(peer, other)
    until(shortened, 2 * shortcut.AGAIN)


def test_a_link_that_is_used_is_shortened_at_both_ends_and_the_old_one_goes_when_it_is_idle(pair, monkeypatch):
    a, b = pair
    use(b, a.peer_id, 1)
    assert not way(b, a.peer_id)
    old = b.host._links[a.peer_id, 'call']
    drawn(b, a.peer_id)
    until(lambda: way(a, b.peer_id), 10)
    assert old in b.host._retired and old.alive
    monkeypatch.setattr(host_module.Host._retire, '__defaults__', (0.5,))
    until(lambda: not old.alive, 10)
    use(b, a.peer_id), use(a, b.peer_id)
    assert way(b, a.peer_id) and way(a, b.peer_id)


def test_no_call_is_lost_on_the_way_there(pair):
    a, b = pair
    large = torch.randn(1 << 20)
    with ThreadPoolExecutor(16) as pool: results = list(pool.map(lambda i: b.call(a.peer_id, 'call.echo', {'i': i}, [large + i], timeout=60), range(64)))
    for i, (meta, (y,)) in enumerate(results): assert meta == {'i': i} and torch.equal(y, large + i)
    assert way(b, a.peer_id)


def test_it_is_asked_for_by_name_and_by_ticket_only(pair):
    a, b = pair
    name = '\0' + a.host.shortcuts.name
    for shown in b'', os.urandom(TICKET), os.urandom(5 * TICKET):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(shortcut.PATIENCE + 3)
            stranger.connect(name)
            stranger.sendall(shown)
            try: assert stranger.recv(1) == b''  # closed: at once, or when its time is over
            except ConnectionResetError: pass  # with bytes that nobody has read
    assert a.host._came == {b.peer_id: 1}
    until(lambda: a.host.shortcuts._waiting == 0, 5)


def test_a_ticket_holds_once_and_for_a_while(pair, monkeypatch):
    a, b = pair
    use(b, a.peer_id, 1)
    knock = lambda meta: b.portal.run(shortcut._knock, meta['name'], meta['ticket'], meta['answer'])
    meta, _ = b.call(a.peer_id, 'call.shortcut')
    first = knock(meta)
    with pytest.raises(trio.BrokenResourceError): knock(meta)
    b.portal.run(first.reset)
    monkeypatch.setattr(shortcut, 'HOLDS', 0.)
    meta, _ = b.call(a.peer_id, 'call.shortcut')
    with pytest.raises(trio.BrokenResourceError): knock(meta)
    assert len(a.host.shortcuts._tickets) < 2
    monkeypatch.setattr(shortcut, 'HOLDS', 5.)
    monkeypatch.setattr(shortcut, 'MOST_TICKETS', 3)
    with pytest.raises(Refused, match='no shortcut'):
        for _ in range(5): b.call(a.peer_id, 'call.shortcut')


@pytest.mark.parametrize('told', [{}, {'name': 'X11', 'ticket': b'', 'answer': b''}, {'name': 'lah_nb-' + '0' * 32, 'ticket': bytes(32), 'answer': bytes(32)}])
def test_who_tells_of_a_way_that_is_none_is_called_as_before(pair, told):
    a, b = pair
    async def lie(request): return told, ()
    a.serve('call.shortcut', lie)
    use(b, a.peer_id, 60)
    assert streams(b, a.peer_id) and not way(b, a.peer_id)


def test_who_takes_the_name_cannot_take_the_calls(pair):
    a, b = pair
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind('\0lah_nb-' + '1' * 32)
        impostor.listen()
        async def misled(request): return {'name': 'lah_nb-' + '1' * 32, 'ticket': bytes(TICKET), 'answer': os.urandom(TICKET)}, ()
        a.serve('call.shortcut', misled)
        use(b, a.peer_id, 1)
        with ThreadPoolExecutor(1) as pool:
            def answer():
                came, _ = impostor.accept()
                with came:
                    came.recv(TICKET)
                    came.sendall(bytes(TICKET))
                    return came.recv(1)
            heard = pool.submit(answer)
            use(b, a.peer_id, 60)
            assert heard.result(10) == b'' and not way(b, a.peer_id)


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv('LAH_SHORTCUT', '0')
    with Peer() as a, Peer() as b:
        a.serve('call.echo', echo)
        b.connect(a.addrs[0])
        use(b, a.peer_id, 60)
        assert not way(b, a.peer_id)
        with pytest.raises(Refused, match='no shortcut'): b.call(a.peer_id, 'call.shortcut')


def test_who_is_killed_fails_the_calls_that_wait_and_who_stops_is_noticed(other_process):
    process, addr = other_process
    with Peer() as peer:
        id = peer.connect(addr)
        drawn(peer, id)
        freeze(process.pid)
        start = time.monotonic()
        with pytest.raises(Unreachable, match='silent'): peer.call(id, 'call.echo', {}, ROWS, timeout=20)
        assert time.monotonic() - start < 7
        os.kill(process.pid, signal.SIGCONT)
        drawn(peer, id)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(peer.call, id, 'call.sleep', timeout=20)
            time.sleep(0.5)
            start = time.monotonic()
            process.kill()
            with pytest.raises(Unreachable): waits.result()
            assert time.monotonic() - start < 2


def test_dropping_a_peer_ends_the_way_to_it(pair):
    a, b = pair
    drawn(b, a.peer_id)
    until(lambda: way(a, b.peer_id), 10)
    b.portal.run(b.host.drop, a.peer_id)
    until(lambda: not any(link.alive for link in a.host._links.values()), 10)
    use(b, a.peer_id, 2)


def test_garbage_on_it_costs_its_sender_that_way_only(pair):
    a, b = pair
    use(b, a.peer_id, 1)
    meta, _ = b.call(a.peer_id, 'call.shortcut')
    knocked = b.portal.run(shortcut._knock, meta['name'], meta['ticket'], meta['answer'])
    async def rubbish():
        await knocked.write(b'\xff' * 1000)
        with trio.fail_after(5):
            try:
                while await knocked.read(1024): pass
            except trio.BrokenResourceError: pass  # closed, with what it had not read
    b.portal.run(rubbish)
    b.portal.run(knocked.reset)
    use(b, a.peer_id, 2)

