"Experts outlive the peers that host them: checkpoints, copies on other peers, adoption, hand-over, collection."
import json, subprocess, sys, time

import pytest, torch, trio
from memory import simulate

from lah_nb import DMoE, Swarm, at_home, collect
from lah_nb.command.cli import main as lah_nb_command
from lah_nb.errors import LahError
from lah_nb.mixture.adoption import keep_alive
from lah_nb.mixture.copies import rank
from lah_nb.mixture.experts import Expert
from lah_nb.mixture.packed import expert_path, load_expert, pack_expert, save_expert, shortened
from lah_nb.mixture.server import Server, claim
from lah_nb.network import DHT, MemoryHub


async def inline(fn): return fn()


def learn(expert, steps=1):
    for _ in range(steps): expert.backward(torch.ones(2, expert.hidden_dim), torch.ones(2, expert.hidden_dim))


def quick(uid, **options): return Expert(uid, 'ffn', 8, **options)


def serve(dht, experts, **options):
    server = Server(dht.network, dht, experts, **options)
    server.runtime.execute = inline
    return server


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
from lah_nb.mixture.packed import write_durably
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


class Swarms:
    "Hosts in memory, one expert each"
    def __init__(self, hub, nursery, copies=4): self.hub, self.nursery, self.copies, self.first = hub, nursery, copies, None

    async def host(self, *uids, network=None, experts=None, **options):
        dht = DHT(network or self.hub.peer(), clock=trio.current_time)
        await self.nursery.start(dht.run)
        if self.first: await dht.join({self.first.peer_id: self.first.addrs})
        else: self.first = dht.network
        server = serve(dht, experts or [quick(uid) for uid in uids], **options)
        adoption = keep_alive(server, self.copies)
        adoption.life = trio.CancelScope()
        async def live(*, task_status):
            with adoption.life: await server.run(task_status=task_status)
            self.hub.peers.pop(dht.peer_id, None)
        await self.nursery.start(live)
        return adoption

    def kill(self, adoption):
        del self.hub.peers[adoption.network.peer_id]
        adoption.server.hands_over = False
        adoption.life.cancel()


def story(afn):
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            await afn(Swarms(hub, nursery))
            nursery.cancel_scope.cancel()
    simulate(main)


def hosts_of(uid, *adoptions): return [each for each in adoptions if uid in each.server.experts]


def test_copies_follow_updates_and_unchanged_ones_are_not_sent_again():
    async def main(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(7)]
        await trio.sleep(20)
        ids = {each.network.peer_id: each for each in hosts}
        for each in hosts:
            uid, = each.server.experts
            holders = [peer for peer, _ in each.copies.sent[uid]]
            assert len(holders) == 4 and all(uid in ids[peer].copies.held for peer in holders)
        kept = []
        for each in hosts:
            handler = each.network.methods['call.keep'].handler
            async def note(request, handler=handler):
                kept.append((trio.current_time(), request.meta['uid'], request.meta['updates']))
                return await handler(request)
            each.network.methods['call.keep'] = each.network.methods['call.keep']._replace(handler=note)
        await trio.sleep(100)
        assert not kept
        learn(hosts[0].server.experts['ffn.0'], 3)
        await trio.sleep(40)
        assert [(uid, n) for _, uid, n in kept] == [('ffn.0', 3)] * 4
        learn(hosts[0].server.experts['ffn.0'], 120)
        await trio.sleep(3)
        assert [n for _, _, n in kept[4:]] == [123] * 4
        await trio.sleep(100)  # those that only held it while the swarm was small have dropped it
        assert sum('ffn.0' in each.copies.held for each in hosts) == 4
    story(main)


def test_no_copy_moves_to_a_newcomer_unless_many_rank_before_its_holder():
    async def main(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(6)]
        await trio.sleep(20)
        before = {uid: dict(sent) for each in hosts for uid, sent in each.copies.sent.items()}
        new = await swarm.host('ffn.6')
        await trio.sleep(100)
        assert not new.copies.held and before == {uid: dict(sent) for each in hosts for uid, sent in each.copies.sent.items()}
        swarm.kill(hosts[0])
        await trio.sleep(40)
        assert len(new.copies.held) >= 2  # of five places that are free each, it is the only one, or one of two, to take them
        copies = hosts[1].copies
        peers = [f'peer {i}' for i in range(40)]
        first = rank('ffn.0', peers)
        assert copies.chosen('ffn.0', peers, {first[7], first[8]}) == [first[7], *first[:3]]
    story(main)


def test_a_killed_hosts_experts_are_adopted_once_with_all_they_knew():
    async def main(swarm):
        a = await swarm.host('ffn.0', 'ffn.1', 'ffn.2')
        rest = [await swarm.host(f'ffn.{i}') for i in range(3, 8)]
        for expert in a.server.experts.values(): learn(expert, 5)
        await trio.sleep(40)
        before = {uid: expert.state() for uid, expert in a.server.experts.items()}
        swarm.kill(a)
        await trio.sleep(20)
        for uid, state in before.items():
            found, = hosts_of(uid, *rest)
            after = found.server.experts[uid].state()
            assert state.keys() == after.keys() and after['updates'] == 5
            for name in state: torch.testing.assert_close(after[name], state[name], rtol=2**-8, atol=0)
        await trio.sleep(60)
        assert [len(hosts_of(uid, *rest)) for uid in before] == [1, 1, 1]
        adopter, = hosts_of('ffn.0', *rest)
        swarm.kill(adopter)  # and it has made copies of its own
        await trio.sleep(25)
        assert len(hosts_of('ffn.0', *[each for each in rest if each is not adopter])) == 1
    story(main)


def test_a_holder_that_dies_is_missed_at_once():
    "Nothing was due, and its record lives for half a minute"
    async def main(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(7)]
        await trio.sleep(20)
        ids = {each.network.peer_id: each for each in hosts}
        before = {peer for peer, _ in hosts[0].copies.sent['ffn.0']}
        del swarm.hub.peers[victim := min(before)]  # it says no farewell
        await trio.sleep(5)
        after = {peer for peer, _ in hosts[0].copies.sent['ffn.0']}
        assert victim not in after and len(after) == 4 and all('ffn.0' in ids[peer].copies.held for peer in after)
    story(main)


def test_a_copy_that_comes_while_hosts_are_looked_up_waits_for_the_next_look():
    async def main(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(4)]
        await trio.sleep(30)
        each = hosts[0]
        uid, copy = each.copies.held.popitem()
        get = each.dht.get
        async def late(*args, **options):
            found = await get(*args, **options)
            each.copies.held[uid] = copy
            return found
        each.dht.get = late
        await each.look()
        assert uid in each.copies.held
        await trio.sleep(30)  # its own looks went on
        assert each.network.peer_id in swarm.hub.peers and uid in each.copies.held
    story(main)


def test_who_is_about_to_host_an_expert_is_asked_again_at_the_next_look():
    "It has announced it, and does not serve it yet: that answer is not believed for long"
    async def main(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(4)]
        await trio.sleep(40)
        each, other = hosts[:2]
        uid = next(iter(other.server.experts))
        expert = other.server.experts.pop(uid)
        each._answers.clear()
        await each.look()
        assert uid in each._orphans
        other.server.experts[uid] = expert
        await each.look()
        assert uid not in each._orphans
    story(main)


def test_hosts_at_rest_ask_little_of_one_another():
    "Each watches over copies of the others' experts; with all lists kept fresh, and everybody asked every two seconds, that made twelve calls a second"
    async def main(swarm):
        hosts = [await swarm.host(*(f'ffn.{i}.{j}' for j in range(4))) for i in range(8)]
        await trio.sleep(90)
        assert all(len(each.copies.held) > 8 for each in hosts)
        before = [each.network.calls for each in hosts]
        await trio.sleep(60)
        made = [(each.network.calls - n) / 60 for each, n in zip(hosts, before)]
        assert 0.5 < max(made) < 6, made
    story(main)


def test_a_copy_in_half_the_bytes_is_a_checkpoint_too(tmp_path):
    "As `collect` writes it, where only a holder was left"
    learn(expert := quick('ffn.0'), 3)
    expert_path(tmp_path, 'ffn.0').write_bytes(pack_expert(expert, shortened(expert.state())))
    again = quick('ffn.0')
    assert load_expert(again, tmp_path) and {t.dtype for t in again.moments.values()} == {torch.float32}
    learn(again, 1)
    assert again.updates == 4


def test_who_adopts_an_expert_sends_no_copy_to_those_who_have_one():
    async def main(swarm):
        a = await swarm.host('ffn.0')
        rest = [await swarm.host(f'ffn.{i}') for i in range(1, 6)]
        learn(a.server.experts['ffn.0'], 5)
        await trio.sleep(40)
        assert sum('ffn.0' in each.copies.held for each in rest) == 4
        kept = []
        for each in rest:
            handler = each.network.methods['call.keep'].handler
            async def note(request, handler=handler):
                kept.append(request.meta['uid'])
                return await handler(request)
            each.network.methods['call.keep'] = each.network.methods['call.keep']._replace(handler=note)
        swarm.kill(a)
        await trio.sleep(60)
        assert len(hosts_of('ffn.0', *rest)) == 1 and sum('ffn.0' in each.copies.held for each in rest) == 4
        assert kept.count('ffn.0') == 1  # to the only one that had none
    story(main)


def test_a_silent_host_is_given_time_and_settles_with_who_adopted_meanwhile():
    async def main(swarm):
        a, b, c = [await swarm.host(f'ffn.{i}') for i in range(3)]
        await trio.sleep(20)
        a.network.silent = True
        await trio.sleep(15)
        assert not hosts_of('ffn.0', b, c)
        await trio.sleep(40)
        adopter, = hosts_of('ffn.0', b, c)
        learn(adopter.server.experts['ffn.0'], 7)
        a.network.silent = False
        await trio.sleep(60)
        assert not hosts_of('ffn.0', b, c) and a.server.experts['ffn.0'].updates == 7
    story(main)


def test_two_that_adopted_the_same_settle_it():
    async def main(swarm):
        a, b, c = [await swarm.host(f'ffn.{i}') for i in range(3)]
        await trio.sleep(10)
        swarm.kill(a)
        for each, steps in (b, 2), (c, 5):
            expert = quick('ffn.0')
            learn(expert, steps)
            await each.adopt([pack_expert(expert)])
        await trio.sleep(15)
        assert hosts_of('ffn.0', b, c) == [c]
        await trio.sleep(40)  # the records of the other are gone, too
        assert [r.author for r in (await b.dht.get(['experts/ffn'], max_age=0.))['experts/ffn'] if r.subkey == '0'] == [c.network.peer_id]
    story(main)


def test_a_host_that_starts_again_goes_on_from_the_newest_state_and_is_the_only_one(tmp_path):
    old = quick('ffn.0')
    learn(old, 2)
    save_expert(old, tmp_path)
    async def main(swarm):
        b, c = [await swarm.host(f'ffn.{i}') for i in (1, 2)]
        learn(expert := quick('ffn.0'), 3)
        a = await swarm.host(experts=[expert])
        await trio.sleep(20)
        swarm.kill(a)
        await trio.sleep(20)
        adopter, = hosts_of('ffn.0', b, c)
        learn(adopter.server.experts['ffn.0'], 4)
        again = await swarm.host('ffn.0', checkpoint_dir=tmp_path)
        assert again.server.experts['ffn.0'].updates == 7
        await trio.sleep(20)
        assert hosts_of('ffn.0', again, b, c) == [again]
    story(main)


def test_a_host_that_began_from_nothing_hears_from_a_holder_that_there_is_more(monkeypatch):
    "Nobody had answered in time when it began, so it went on from 0 updates, and holders kept the rest for nobody"
    async def main(swarm):
        b, c = [await swarm.host(f'ffn.{i}') for i in (1, 2)]
        learn(expert := quick('ffn.0'), 5)
        a = await swarm.host(experts=[expert])
        await trio.sleep(20)
        swarm.kill(a)
        async def nobody_answers(adoption): pass
        monkeypatch.setattr('lah_nb.mixture.adoption.Adoption.catch_up', nobody_answers)
        again = await swarm.host('ffn.0')
        assert again.server.experts['ffn.0'].updates == 0
        await trio.sleep(20)
        assert again.server.experts['ffn.0'].updates == 5 and hosts_of('ffn.0', again, b, c) == [again]
        learn(again.server.experts['ffn.0'])
        await trio.sleep(60)  # only who has just come asks that
        assert again.server.experts['ffn.0'].updates == 6
    story(main)


def test_adopted_experts_are_free_for_a_peer_that_wants_them():
    async def main(swarm):
        a = await swarm.host('ffn.0', 'ffn.1')
        b = await swarm.host('ffn.2')
        for expert in a.server.experts.values(): learn(expert, 3)
        await trio.sleep(40)
        swarm.kill(a)
        await trio.sleep(60)
        assert sorted(b.server.experts) == ['ffn.0', 'ffn.1', 'ffn.2']
        dht = DHT(swarm.hub.peer(), clock=trio.current_time)
        await swarm.nursery.start(dht.run)
        await dht.join({b.network.peer_id: b.network.addrs})
        assert sorted(await claim(dht, 'ffn.[0:3]', 2, schema=quick('ffn.0').schema)) == ['ffn.0', 'ffn.1']
        c = serve(dht, [quick('ffn.0'), quick('ffn.1')])
        keep_alive(c, 4)
        await swarm.nursery.start(c.run)
        assert [expert.updates for expert in c.experts.values()] == [3, 3]
        await trio.sleep(20)
        assert list(b.server.experts) == ['ffn.2']
    story(main)


def test_who_leaves_in_order_loses_nothing_and_a_whole_swarm_ends_at_once():
    async def main(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(4)]
        await trio.sleep(10)
        for n, each in enumerate(hosts[:3]):
            learn(each.server.experts[f'ffn.{n}'], 10 + n)  # newer than any copy
            each.life.cancel()
            await trio.sleep(6)
        last = hosts[-1].server.experts
        assert {uid: expert.updates for uid, expert in last.items()} == {'ffn.0': 10, 'ffn.1': 11, 'ffn.2': 12, 'ffn.3': 0}
    story(main)
    async def end(swarm):
        hosts = [await swarm.host(f'ffn.{i}') for i in range(4)]
        await trio.sleep(10)
        for each in hosts: each.server.hands_over = False
        for each in hosts: each.life.cancel()
        while any(each.network.peer_id in swarm.hub.peers for each in hosts): await trio.sleep(0.1)
        assert not any(each.adopted or each.handed for each in hosts)
    story(end)


def test_hostile_states_are_not_kept():
    async def main(swarm):
        a, b = [await swarm.host(f'ffn.{i}') for i in range(2)]
        await trio.sleep(10)
        learn(expert := quick('ffn.0'), 2)
        good = pack_expert(expert)
        tensors = expert.state()
        tensors['module.' + next(iter(expert.module.state_dict()))].fill_(float('nan'))
        async def send(data, method='call.keep', who=a, uid='ffn.0', cls='ffn', dim=8, updates=2):
            meta = {'uid': uid, 'cls': cls, 'dim': dim, 'updates': updates}
            await who.network.call(b.network.peer_id, method, meta, [torch.frombuffer(bytearray(data), dtype=torch.uint8)], timeout=5)
        stranger = DHT(swarm.hub.peer(), clock=trio.current_time)
        class Who: network = stranger.network
        attempts = [
            dict(data=pack_expert(expert, tensors)), dict(data=b'\x80\x04pickle' * 10), dict(data=b'\xff' * 64), dict(data=good[:-9]), dict(data=good, updates=9),
            dict(data=good, uid='ffn.7'), dict(data=good, cls='nop'), dict(data=good, dim=16), dict(data=good, cls='os.system'),
            dict(data=good + b'x' * (1 << 20)), dict(data=good, dim=1 << 40), dict(data=good, updates=-1), dict(data=good, who=Who)]
        before = b.copies.held['ffn.0']
        for attempt in attempts:
            for method in 'call.keep', 'call.adopt':
                with pytest.raises(LahError): await send(method=method, **attempt)
        assert b.copies.held['ffn.0'] is before and list(b.server.experts) == ['ffn.1']
        b.copies.room = 10
        with pytest.raises(LahError, match='room'): await send(good)
        b.copies.room = 1 << 30
        await send(good)
        assert b.copies.held['ffn.0'].about.updates == 2
        for meta in {'uids': ['x'] * 5000}, {'uids': 3}, {}:
            with pytest.raises(LahError): await a.network.call(b.network.peer_id, 'call.copies', meta, timeout=5)
        with pytest.raises(LahError, match='no holder'):  # only a holder may say that it has gone on with an expert
            await Who.network.call(b.network.peer_id, 'call.newer', {'uid': 'ffn.1', 'updates': 1000}, timeout=5)
    story(main)


def test_what_was_gathered_runs_at_home_and_starts_another_swarm(tmp_path, capsys):
    folder = str(tmp_path / 'gathered')
    with Swarm.local(peers=2, experts='e.[0:2].[0:3]', hidden_dim=16, optimizer='sgd', lr=0.1) as swarm:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), DMoE(swarm, 16, grid=(2, 3), uid_prefix='e', k=3, balance=0.5))
        for _ in range(10): model(torch.randn(16, 16)).square().mean().backward()
        assert lah_nb_command(['collect', '--join', swarm.addrs[0], '--out', folder, '--json']) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(told['experts']) == 6 and not told['missing'] and all(each['fetched'] for each in told['experts'].values())
        x = torch.randn(8, 16)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        home = at_home(model, folder)
        ys = [each(x) for each, x in zip((home, model), xs)]
        torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-5)
        for y in ys: y.square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
        assert torch.load(_saved(home, tmp_path), weights_only=False)(x).shape == (8, 16)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'gathered').iterdir()}
    with Swarm.local(peers=2, experts='e.[0:2].[0:3]', hidden_dim=16, start_from=folder, copies=0) as swarm:
        model[1].swarm = swarm
        model.eval()
        home = at_home(model, folder)  # the balance has moved since
        assert not home[1].training
        with torch.no_grad(): torch.testing.assert_close(model(x), home(x), rtol=1e-5, atol=1e-5)
        again = collect(swarm, folder, progress=False)
        assert not any(each['fetched'] for each in again.experts.values())
        swarm.peers[0].kill()
        lacking = collect(swarm, tmp_path / 'late', progress=False)
        assert len(lacking.missing) == 3 and not lacking.to_dict()['good']
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'gathered').iterdir()}


def _saved(model, folder):
    torch.save(model, folder / 'model.pt')
    return folder / 'model.pt'


def test_a_caller_that_scales_or_flips_its_gradients_is_refused_and_the_others_are_not():
    expert, generator = quick('ffn.0', lr=0.01), torch.Generator().manual_seed(0)
    def part(scale=1.):
        x = torch.randn(4, 8, generator=generator)
        y = expert.forward(x)
        return x, scale * (y - 3 * x) / 4, 0
    for _ in range(60): expert.backward_batch([part()])
    assert not expert.refused
    before = expert.flat.clone()
    for scale in 1e3, -1e3, 1e30:
        result, = expert.backward_batch([part(scale)])
        assert 'usual' in result.text
    assert expert.refused == 3 and torch.equal(expert.flat, before)
    for _ in range(30):
        good, bad = expert.backward_batch([part(), part(-1e3)])
        assert isinstance(good, torch.Tensor) and not isinstance(bad, torch.Tensor)
    assert expert.refused == 33
    for _ in range(300): expert.backward_batch([part(0.001)])  # nearly done learning: a row that is still wrong may say so
    refused = expert.refused
    expert.backward_batch([part(0.1)])
    assert expert.refused == refused
    for _ in range(300): expert.backward_batch([part(1e3)])  # all of them: another loss, not an attack
    refused = expert.refused
    expert.backward_batch([part(1e3)])
    assert expert.refused == refused


@pytest.mark.slow
def test_three_of_eight_peers_are_killed_and_all_experts_come_back():
    with Swarm.local(peers=8, experts='ffn.[0:8].[0:8]') as swarm:
        layer = DMoE(swarm, 64, grid=(8, 8))
        optimizer = torch.optim.Adam(layer.parameters())
        def step():
            x = torch.randn(32, 64)
            loss = (layer(x) - 2 * x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()
        first, deadline = step(), time.monotonic() + 15
        while time.monotonic() < deadline: step()
        for peer in swarm.peers[:3]: peer.kill()
        deadline, killed = time.monotonic() + 60, swarm.snapshot(timeout=5.).experts
        while (found := swarm.snapshot(timeout=5.).experts) < 64 and time.monotonic() < deadline: loss = step()
        assert killed < 64 and found == 64
        for _ in range(20): loss = step()
        assert loss < first
        start = time.monotonic()
    assert time.monotonic() - start < 10
