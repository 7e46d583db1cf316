"What callers share: a greedy one is refused at once and starves nobody, an honest one never meets a limit, and nothing is left over"
import struct
from dataclasses import replace

import pytest, torch, trio
from libp2p.host.exceptions import StreamFailure
from libp2p.peer.id import ID
from memory import simulate

from lah_nb.network import DHT, Host, Link, MemoryHub, Record, Records, Refused, Traffic, new_identity, pack, peer_id_of
from lah_nb.network import link as link_module
from lah_nb.network.calls import Served, envelope
from lah_nb.network.host import MOST_STREAMS, _protocol_id
from lah_nb.network.shares import Limits, Rate, Share
from lah_nb.network.wire import CANCEL, REQUEST, chunks


async def sleepy(request):
    await trio.sleep(1.)
    return request.meta, request.tensors


def test_a_greedy_trainer_is_refused_at_once_and_others_are_served():
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            host, greedy, honest = hub.peer(), hub.peer(), hub.peer()
            host.serve('call.sleepy', sleepy)
            told = {greedy: [], honest: []}
            async def ask(who):
                start = trio.current_time()
                try: await who.call(host.peer_id, 'call.sleepy', {}, [torch.zeros(1 << 10)], timeout=30.)
                except Refused as error:
                    assert trio.current_time() - start < 0.1 and 'busy' in error.why
                    told[who].append(error.kind)
                else: told[who].append('ok')
            async def flood():
                for _ in range(100):
                    for _ in range(50): nursery.start_soon(ask, greedy)
                    await trio.sleep(0.01)
            async def train():
                async with trio.open_nursery() as batches:
                    for _ in range(64 * 4):  # 64 batches in flight, each with its calls made twice, and as many audits
                        batches.start_soon(ask, honest)
                        await trio.sleep(0.005)
            nursery.start_soon(flood)
            await train()
            await trio.sleep(30)
            assert set(told[honest]) == {'ok'}
            assert told[greedy].count('Busy') > 100 < told[greedy].count('ok')
            assert not (host.limits.calls.each or host.limits.bytes.each)
            nursery.cancel_scope.cancel()
    simulate(main)


def test_a_caller_that_asks_too_often_is_refused():
    async def main():
        async with MemoryHub() as hub:
            host, greedy, honest = hub.peer(), hub.peer(), hub.peer()
            host.limits.rate = Rate(300, 'calls of the last second')
            with pytest.raises(Refused, match='busy'):
                for _ in range(200): await greedy.call(host.peer_id, 'call.ping', {}, timeout=1.)
            for _ in range(60): await honest.call(host.peer_id, 'call.ping', {}, timeout=1.)
            await trio.sleep(2)
            await greedy.call(host.peer_id, 'call.ping', {}, timeout=1.)
    simulate(main)


def test_a_dht_looks_at_so_many_keys_of_a_caller():
    async def main():
        async with MemoryHub() as hub, trio.open_nursery() as nursery:
            a, b = [DHT(hub.peer(), clock=trio.current_time) for _ in range(2)]
            for dht in a, b: await nursery.start(dht.run)
            await b.join({a.peer_id: a.network.addrs})
            query = {'keys': [f'some/{i}' for i in range(1024)], 'values': False, 'addrs': []}
            with pytest.raises(Refused, match='busy'):
                for _ in range(30): await b.network.call(a.peer_id, 'dht.find', query, timeout=5.)
            await trio.sleep(5)
            await b.network.call(a.peer_id, 'dht.find', query, timeout=5.)
            nursery.cancel_scope.cancel()
    simulate(main)


def by(author, key, subkey, seq=1000):
    return Record(key, subkey, peer_id_of(author), b'x', seq=seq, ttl=30.)


def test_one_author_fills_neither_the_table_nor_a_key():
    greedy, honest = new_identity(b'g' * 32), new_identity(b'h' * 32)
    table = Records(most=1000)
    kept = [table.put(by(greedy, f'some/{i}', '0'), 30., now=0.) for i in range(2000)]
    assert sum(kept) == 500
    assert all(table.put(by(honest, f'some/{i}', '0'), 30., now=0.) for i in range(200))
    assert table.put(by(greedy, 'some/0', '0', seq=2000), 30., now=1.)  # what it has it may renew
    table.sweep(now=60.)
    assert table.size == 0 and len(table._shares) == 1 and not table._shares[''].each
    table = Records()
    kept = [table.put(by(greedy, 'experts/ffn', f'{i}'), 30., now=0.) for i in range(10_000)]
    assert sum(kept) == 4096  # and a reader hears of all others, too
    assert all(table.put(by(honest, 'experts/ffn', f'ours{i}'), 30., now=0.) for i in range(1000))
    assert all(table.put(by(greedy, 'experts/other', f'{i}'), 30., now=0.) for i in range(100))
    for i in range(100): table.put(replace(by(greedy, 'experts/ffn', f'{i}', seq=2000), value=None), 30., now=1.)
    table.sweep(now=100.)
    assert table.size == 0 and len(table._shares) == 1 and not table._shares[''].each


class Pipe:
    def __init__(self, send, receive): self.send, self.receive = send, receive
    async def write(self, data): await self.send.send(data)
    async def read(self, n): return await self.receive.receive()
    async def reset(self): self.send.close()


class End:
    def __init__(self, parity=0):
        self.methods, self.parity = {'call.sleepy': Served(sleepy, None)}, lambda link: parity
        self.traffic, self.limits = Traffic(), Limits()
    def refusal(self, peer_id, method): return None


def linked(story):
    "Run `story(link, host, send, received)` with a link whose other end is written by hand"
    async def main():
        (send, receive), (back, received), host = trio.open_memory_channel(10_000), trio.open_memory_channel(4), End()
        link = Link(Pipe(back, receive), 'greedy', host, 'call')
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            await trio.sleep(0)
            await story(link, host, send, received)
            link.close('done')
        assert not (host.limits.calls.each or host.limits.bytes.each)
    simulate(main)


def beginning(id, size, seconds=5.):
    "The first chunk of a request with a tensor of `size` numbers"
    return b''.join(bytes(part) for part in next(chunks(REQUEST, id, pack(envelope('call.sleepy', {}, seconds), (torch.zeros(size),)))))


def test_requests_given_up_half_way_leave_nothing_behind():
    "300 uploads were given up: the link refused all others for ever"
    async def story(link, host, send, received):
        for id in range(300):
            await send.send(beginning(id, 1 << 18))
            await send.send(struct.pack('!BQI', CANCEL, id, 0))
        await trio.testing.wait_all_tasks_blocked()
        assert not link._handlers and not host.limits.bytes.all and link.alive
    linked(story)


def test_a_request_that_does_not_arrive_in_time_is_forgotten():
    async def story(link, host, send, received):
        for id in range(5): await send.send(beginning(id, 64 << 20 >> 2, seconds=3.))
        await trio.testing.wait_all_tasks_blocked()
        assert host.limits.bytes.all == 5 * (64 << 20)
        await trio.sleep(5)
        assert not host.limits.bytes.all and link.alive and not link._assembler._open
    linked(story)


def test_who_asks_on_and_reads_no_answers_is_cut_off(monkeypatch):
    monkeypatch.setattr(link_module, 'MAX_UNREAD', 100)
    async def story(link, host, send, received):
        frame = b''.join(bytes(part) for part in next(chunks(REQUEST, 1, pack(envelope('call.nothing', {}, 5.)))))
        for i in range(1000): send.send_nowait(frame)
        await trio.sleep(1)
        assert not link.alive and 'does not read' in link.why
        assert len(link._queue) < 250
    linked(story)


def test_answers_take_turns_within_what_the_other_end_can_hold(monkeypatch):
    "It closed the link when more than 64 messages, or 512 MiB of them, were half-way"
    monkeypatch.setattr(link_module, 'MAX_BODY', 3 << 20)
    async def story(link, host, send, received):
        for i in range(100): link._send(REQUEST, i, [bytes(1 << 20)])
        link._send(REQUEST, 100, [b'small'])
        begun, seen = set(), []
        async with trio.open_nursery() as nursery:
            async def read():
                async for data in received: seen.append(data)
            nursery.start_soon(read)
            while link._queue:
                begun.add(sum(message.begun for message in link._queue))
                await trio.sleep(0)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert max(begun) <= 4 and link._queued == link._halfway == 0
        assert b'small' in b''.join(seen[:8]) and sum(map(len, seen)) > 100 << 20
    linked(story)


def over_sockets(story, n):
    async def main():
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                hosts = [Host() for _ in range(n)]
                for host in hosts:
                    await nursery.start(host.run)
                    host.serve('call.sleepy', sleepy)
                for host in hosts[1:]: host.learn(hosts[0].peer_id, hosts[0].addrs)
                await story(*hosts)
                nursery.cancel_scope.cancel()
    trio.run(main)


def test_over_sockets_a_greedy_trainer_leaves_room_for_others():
    async def story(host, greedy, honest):
        host.limits.bytes = Share(16 << 20, 'bytes under way')
        told = {greedy: [], honest: []}
        async def ask(who, size):
            start = trio.current_time()
            try: await who.call(host.peer_id, 'call.sleepy', {}, [torch.zeros(size >> 2)], timeout=30.)
            except Refused as error: told[who].append((error.kind, trio.current_time() - start))
            else: told[who].append(('ok', trio.current_time() - start))
        async with trio.open_nursery() as calls:
            for _ in range(16): calls.start_soon(ask, greedy, 2 << 20)
            await trio.sleep(0.5)
            calls.start_soon(ask, honest, 3 << 20)
        assert [kind for kind, _ in told[honest]] == ['ok']
        kinds = [kind for kind, _ in told[greedy]]
        assert kinds.count('Busy') > 4 and kinds.count('ok') >= 4 and set(kinds) == {'ok', 'Busy'}
        await trio.sleep(0.2)
        assert not (host.limits.calls.each or host.limits.bytes.each)
        await ask(greedy, 2 << 20)  # a little later there is room again
        assert told[greedy][-1][0] == 'ok'
    over_sockets(story, 3)


def test_an_honest_trainer_never_meets_a_limit():
    "A hundred large calls at once ended the link; one of 64 MiB each way is nothing"
    async def story(host, trainer):
        async def ask(size): await trainer.call(host.peer_id, 'call.sleepy', {}, [torch.zeros(size >> 2)], timeout=50.)
        async with trio.open_nursery() as calls:
            for _ in range(128): calls.start_soon(ask, 300 << 10)
        async with trio.open_nursery() as calls:
            calls.start_soon(ask, 64 << 20)
    over_sockets(story, 2)


def test_a_peer_may_open_so_many_streams():
    async def story(host, greedy, honest):
        await greedy.call(host.peer_id, 'call.ping', {}, timeout=10.)
        with pytest.raises(StreamFailure):
            for _ in range(MOST_STREAMS + 10):
                await greedy._host.new_stream(ID.from_base58(host.peer_id), [_protocol_id('call')])
        await trio.sleep(0.5)
        assert host._came[greedy.peer_id] == MOST_STREAMS
        await honest.call(host.peer_id, 'call.ping', {}, timeout=10.)
    over_sockets(story, 3)
