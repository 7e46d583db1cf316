"The layer over real processes: equal to one process, and calm when peers die."
import copy, gc, os, signal, threading, time

import pytest, torch
from conftest import freeze, until
from torch import nn

from lah_nb.mixture.learning import BETAS
from lah_nb import DMoE, Swarm, TooFewExperts
from lah_nb.mixture import Expert, load_expert, recording
from lah_nb.errors import LahError


class OneProcess(nn.Module):
    "The same mixture in one module, written the plain way: every cell scored, top-k, softmax, plain optimizers"
    def __init__(self, uids, cls, dim, gate, grid, k):
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(Expert(uid, cls, dim).module) for uid in uids)
        for e in self.experts:
            for p in e.parameters(): p.data, p.grad = p.data.clone(), None
        self.optimizers = [torch.optim.Adam(e.parameters(), lr=1e-3, betas=BETAS) for e in self.experts]
        self.gate, self.grid, self.k = copy.deepcopy(gate), grid, k

    def forward(self, x):
        features = x if x.dim() == 2 else x.mean(1)
        rows, columns = self.gate.linear(features).split(self.grid, -1)
        scores = (rows[:, :, None] + columns[:, None, :]).flatten(1)
        best, which = scores.topk(self.k)
        weights = best.softmax(-1)
        every = torch.stack([e(x) for e in self.experts], 1)
        chosen = every[torch.arange(len(x))[:, None], which]
        return (weights.view(*weights.shape, *[1] * (x.dim() - 1)) * chosen).sum(1), which

    def step_experts(self, which):
        for i, (expert, optimizer) in enumerate(zip(self.experts, self.optimizers)):
            if not (which == i).any(): continue
            nn.utils.clip_grad_norm_(expert.parameters(), 1.0)
            optimizer.step()


@pytest.mark.parametrize('cls, shape', [('ffn', (24, 16)), ('transformer', (10, 6, 16))])
def test_over_the_wire_equals_one_process(tmp_path, cls, shape):
    torch.manual_seed(1)
    with Swarm.local(peers=2, experts='e.[0:3].[0:4]', expert_cls=cls, hidden_dim=16, checkpoint_dir=str(tmp_path)) as swarm:
        layer = DMoE(swarm, 16, grid=(3, 4), uid_prefix='e', k=3, balance=False)
        uids = [f'e.{i}.{j}' for i in range(3) for j in range(4)]
        reference = OneProcess(uids, cls, 16, layer.gate, (3, 4), 3)
        for step in range(3):
            x = torch.randn(shape)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            target = torch.randn(shape)
            y = layer(ours)
            y_ref, which = reference(theirs)
            torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-5)
            layer.zero_grad(), reference.zero_grad()
            ((y - target) ** 2).mean().backward()
            ((y_ref - target) ** 2).mean().backward()
            reference.step_experts(which)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
            for p, q in zip(layer.gate.parameters(), reference.gate.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
        assert layer.last.failed == {} and layer.stats.snapshot()['failed_calls'] == 0
    for uid, module in zip(uids, reference.experts):  # the peers saved their experts when they left
        expert = Expert(uid, cls, 16)
        assert load_expert(expert, tmp_path)
        for p, q in zip(expert.module.parameters(), module.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_compression_is_close(swarm):
    x = torch.randn(8, 16)
    layer = DMoE(swarm, 16, grid=(8, 8), balance=False).eval()
    with torch.no_grad(): exact = layer(x)
    for codec, error in ('float16', 2e-3), ('bfloat16', 3e-2), ('blockwise8', 5e-2):
        layer.compression = codec
        with torch.no_grad(): assert 0 < (layer(x) - exact).abs().max() < error


def test_route_by_token_equals_rows(swarm):
    torch.manual_seed(0)
    by_row = DMoE(swarm, 16, grid=(8, 8), balance=False).eval()
    by_token = DMoE(swarm, 16, grid=(8, 8), balance=False, route='token').eval()
    by_token.load_state_dict(by_row.state_dict())
    x = torch.randn(3, 5, 16)
    with torch.no_grad(): torch.testing.assert_close(by_token(x), by_row(x.view(15, 16)).view(3, 5, 16))


def test_wrong_use_is_explained(swarm):
    with pytest.raises(LahError, match=r'takes \(batch, ..., 16\)'): DMoE(swarm, 16, grid=(8, 8))(torch.randn(4, 17))
    with pytest.raises(LahError, match='hidden-dim'): DMoE(swarm, 24, grid=(8, 8))(torch.randn(4, 24))
    with pytest.raises(TooFewExperts, match="'nope'"): DMoE(swarm, 16, grid=(8, 8), uid_prefix='nope')(torch.randn(4, 16))
    with pytest.raises(LahError, match='k_min'): DMoE(swarm, 16, grid=(8, 8), k=2, k_min=3)
    with pytest.raises(LahError, match='compression'): DMoE(swarm, 16, grid=(8, 8), compression='zip')


def test_k_larger_than_the_experts_that_live(swarm):
    layer = DMoE(swarm, 16, grid=(1, 8), k=12)   # this corner of the grid has 8
    layer(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert layer.last.experts == 8 and layer.last.answered == 24


def test_zeros_where_asked():
    with Swarm(listen=['/ip4/127.0.0.1/tcp/0']) as nobody:
        layer = DMoE(nobody, 16, grid=(2, 2), zeros_if_too_few=True)
        start = time.monotonic()
        assert layer(torch.randn(3, 16)).eq(0).all()
        assert time.monotonic() - start < layer.timeout.forward


def test_nan_gradient_is_refused_and_nothing_else(swarm):
    torch.manual_seed(0)
    layer = DMoE(swarm, 16, grid=(8, 8), k=2, balance=False)
    x = torch.randn(6, 16, requires_grad=True)
    with torch.no_grad(): before = layer(x)
    refused = sum(p['refused'] for p in swarm.snapshot().peers)
    y = layer(x)
    y.backward(torch.full_like(y, float('nan')))
    assert layer.last.failed and all('BadGradient' in why for why in layer.last.failed.values())
    with torch.no_grad(): torch.testing.assert_close(layer(x), before)
    assert sum(p['refused'] for p in swarm.snapshot().peers) > refused


def test_every_part_of_a_step_is_recorded(swarm):
    layer = DMoE(swarm, 16, grid=(8, 8))
    x = torch.randn(32, 16, requires_grad=True)
    layer(x).sum().backward()
    with recording() as spans: y = layer(x)
    with recording() as others: layer(x)
    forward = len(spans)
    backward = threading.Thread(target=lambda: y.sum().backward())  # elsewhere, later, and nobody records there
    backward.start(), backward.join()
    assert {s.what for s in spans[:forward]} >= {'choose experts', 'experts, forward', 'forward'} and {s.what for s in spans[forward:]} == {'experts, backward', 'backward'}
    assert not any(s.what == 'backward' for s in others)
    whole = {s.what: s for s in spans if s.where == 'trainer'}
    for s in spans:
        if s.where == 'trainer': continue
        outer = whole[f'experts, {s.what}']
        assert outer.start <= s.start <= s.end <= outer.end and 0 < s.computed and 0 <= s.queued and s.queued + s.computed <= s.end - s.start
    assert {s.where for s in spans if s.what == 'backward'} == {peer.peer_id for peer in swarm.peers}
    latencies = layer.stats.snapshot()['latencies']
    assert latencies.keys() == {peer.peer_id for peer in swarm.peers} and {len(kinds['backward']) for kinds in latencies.values()} == {2}


@pytest.mark.parametrize('dims, cls', [(1, 'ffn'), (2, 'ffn'), (2, 'transformer')])
def test_the_explanation_is_what_happens(swarm, dims, cls):
    layer = DMoE(swarm, 16, grid=(8, 8)[:dims], uid_prefix='ffn' if dims == 2 else 'ffn.3')
    layer.balance.bias0.normal_()
    x = torch.randn(1, 16)
    row = x[0] if cls == 'ffn' else torch.stack([x[0] + 1, x[0] - 1])  # positions are averaged
    why = layer.explain(row)
    layer(x)
    served = layer.stats.snapshot()['served']
    assert set(served) == {e['uid'] for e in why['experts']} and len(served) == 4
    assert sum(e['weight'] for e in why['experts']) == pytest.approx(1) and all(len(e['hosts']) == 1 for e in why['experts'])
    assert [len(level) for level in why['levels']] == [8, 32][:dims] and layer.stats.snapshot()['dispatches'] == 1
    with pytest.raises(LahError, match='one row'): layer.explain(torch.randn(5))


def test_many_threads_share_a_layer(swarm):
    layer = DMoE(swarm, 16, grid=(8, 8))
    errors = []
    def work(seed):
        try:
            mine = copy.deepcopy(layer)
            for _ in range(5): mine(torch.randn(4, 16, requires_grad=True)).sum().backward()
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not errors and layer.stats.snapshot()['dispatches'] == 30


def test_two_swarms_do_not_mix(swarm):
    with Swarm.local(peers=2, experts='ffn.[0:2].[0:2]', hidden_dim=16) as other:
        assert other.snapshot().experts == 4 and swarm.snapshot().experts == 64
        assert not {p.peer_id for p in other.peers} & {p['peer_id'] for p in swarm.snapshot().peers}
        DMoE(other, 16, grid=(2, 2))(torch.randn(4, 16))


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_stands_in(how):
    "Every expert lives twice: the batch in which a host falls silent loses nothing, and does not wait for it"
    with Swarm.local(peers=1, experts='ffn.[0:8]', hidden_dim=16) as swarm:
        swarm.start_peers(1, experts='ffn.[0:8]', hidden_dim=16)
        layer = DMoE(swarm, 16, grid=(8,), k=4)
        def step():
            x = torch.randn(32, 16, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert x.grad.isfinite().all()
            return layer.last
        until(lambda: step() and all(len(swarm.roster.hosts_of(f'ffn.{i}')) == 2 for i in range(8)))
        for _ in range(20): step()  # so that it is known how quick they are, and little time is given to who is late
        assert layer.stats.totals()['hedged_calls'] == 0
        if how == signal.SIGKILL: os.kill(swarm.peers[0].pid, how)
        else: freeze(swarm.peers[0].pid)
        for _ in range(50):
            last = step()
            assert last.answered == 128 and not last.failed and last.seconds < 5, last
            if swarm.peers[0].peer_id in swarm.roster.benched: break  # a batch may have chosen the other for all experts
        assert swarm.peers[0].peer_id in swarm.roster.benched and last.failed_calls >= 1 <= last.hedged_calls
        if how == signal.SIGSTOP: os.kill(swarm.peers[0].pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize('when', ['forward', 'backward'])
def test_a_peer_dies_during(how, when):
    "The batch under way ends within its deadline without an exception; within 5 s training is as fast as before"
    torch.manual_seed(0)
    with Swarm.local(peers=3, experts='ffn.[0:4].[0:6]', hidden_dim=16) as swarm:
        layer = DMoE(swarm, 16, grid=(4, 6))
        def step():
            start = time.monotonic()
            x = torch.randn(32, 16, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert x.grad.isfinite().all()
            return time.monotonic() - start
        usual = sorted(step() for _ in range(10))[5]
        victim = swarm.peers[1]
        if when == 'forward':
            os.kill(victim.pid, how)
            assert step() < layer.timeout.forward + layer.timeout.backward
        else:
            y = layer(torch.randn(32, 16, requires_grad=True))
            os.kill(victim.pid, how)
            start = time.monotonic()
            y.sum().backward()
            assert time.monotonic() - start < layer.timeout.backward
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline: step()
        after = [step() for _ in range(10)]
        assert sorted(after)[5] < max(2 * usual, 0.25), (usual, after)
        assert victim.peer_id in swarm.roster.benched
        if how == signal.SIGSTOP:  # and when it comes back, it is used again
            os.kill(victim.pid, signal.SIGCONT)
            deadline = time.monotonic() + 30
            while victim.peer_id in swarm.roster.benched and time.monotonic() < deadline: time.sleep(0.1)
            assert victim.peer_id not in swarm.roster.benched


def test_tensors_go_without_pythons_collector():
    with Swarm.local(peers=1, experts='ffn.[0:2].[0:2]', hidden_dim=16) as swarm:
        layer = DMoE(swarm, 16, grid=(2, 2), k=2)
        step = lambda: layer(torch.randn(8, 16, requires_grad=True)).sum().backward()
        step()
        gc.collect()
        gc.disable()
        try:
            for _ in range(3): step()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert not [o for o in gc.garbage if isinstance(o, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
