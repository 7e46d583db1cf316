"The layer as an ordinary torch module: dtypes, graphs, copies, processes, checkpointing, batches of any size"
import copy, gc, io, os, pickle, subprocess, sys, time, weakref

import pytest, torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lah_nb import DMoE, Swarm
from lah_nb.errors import LahError
from lah_nb.mixture import Expert
from lah_nb.mixture.gating import Balance
from lah_nb.network.portal import PortalClosed

EXPERTS = '''
import torch
from torch import nn
from lah_nb import register_expert

@register_expert('drops', example=lambda hidden_dim: torch.zeros(2, hidden_dim))
class Drops(nn.Module):
    def __init__(self, hidden_dim):
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim)
    def forward(self, x): return nn.functional.dropout(self.linear(x), 0.5, self.training)

@register_expert('brains', example=lambda hidden_dim: torch.zeros(2, hidden_dim, dtype=torch.bfloat16))
class Brains(nn.Linear):
    def __init__(self, hidden_dim): super().__init__(hidden_dim, hidden_dim, dtype=torch.bfloat16)
'''


@pytest.fixture(scope='module')
def others(swarm, tmp_path_factory):
    "The swarm, with one peer more for each class of experts above"
    file = tmp_path_factory.mktemp('experts') / 'experts.py'
    file.write_text(EXPERTS)
    for name in 'drops', 'brains':
        swarm.start_peers(1, f'{name}.[0:2]', expert_cls=name, hidden_dim=16, expert_file=str(file))
    return swarm


def updates(swarm): return sum(peer['updates'] for peer in swarm.snapshot().peers)


def model(swarm, **options): return nn.Sequential(nn.Linear(16, 16), DMoE(swarm, 16, grid=(8, 8), **options), nn.Linear(16, 3))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype(swarm, dtype):
    net, x = model(swarm).to(dtype), torch.randn(6, 16, dtype=dtype, requires_grad=True)
    y = net(x)
    assert (y.dtype, net[1](x).dtype) == (dtype, dtype)
    y.square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.any()
    assert all(p.grad.dtype == dtype and p.grad.any() for p in net.parameters())
    assert net[1].last.answered == 24 and not net[1].last.failed
    assert net[1].balance.bias1.dtype == torch.float32  # choices are made as before


@pytest.mark.parametrize('within', [False, True])
def test_autocast(swarm, within):
    net, x = model(swarm), torch.randn(6, 16, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        layer, linear = net[1](net[0](x)), nn.Linear(16, 16)(net[0](x))
        loss = net(x).float().square().sum()
        if within: loss.backward()  # not advised, and common
    if not within: loss.backward()
    assert layer.dtype == linear.dtype == torch.bfloat16
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32} == {x.grad.dtype}
    with torch.autocast('cpu', dtype=torch.bfloat16): assert net[1].double()(x.double()).dtype == torch.float64


def test_rows_travel_in_the_dtype_of_the_experts(others):
    layer, x = DMoE(others, 16, grid=(2,), uid_prefix='brains', k=2), torch.randn(6, 16, requires_grad=True)
    for each in x, x.double(), x.bfloat16():
        y = layer.to(each.dtype)(each)
        y.sum().backward()
        assert y.dtype == each.dtype and layer.last.answered == 12 and not layer.last.failed
    assert x.grad.dtype == torch.float32


def test_a_scaled_loss_reaches_the_experts_as_it_is():
    x, moved, grads = torch.randn(4, 8), [], []
    with Swarm.local(1, 'e.0', hidden_dim=8, optimizer='sgd', lr=1e-4) as swarm:
        layer = DMoE(swarm, 8, grid=(1,), uid_prefix='e', k=1)
        answer = lambda: layer.eval()(x).detach()
        for scale in 1., 1024.:
            scaler, before = torch.amp.GradScaler('cpu', init_scale=scale), answer()
            layer.train().loss_scale = scaler.get_scale
            rows = x.clone().requires_grad_()
            scaler.scale(layer(rows).square().sum() / 10).backward()
            grads.append(rows.grad / scale), moved.append(answer() - before)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-3)  # the expert has taken a small step between
    torch.testing.assert_close(*moved, rtol=0.05, atol=1e-5)


def test_a_scaler_nobody_told_of_is_asked_for(swarm):
    layer, x = DMoE(swarm, 16, grid=(8, 8)), torch.randn(2, 16, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.float16): y = layer(x)
    with pytest.warns(UserWarning, match='loss_scale'): y.sum().backward()


def test_compile_breaks_the_graph_and_nothing_more(swarm):
    net = model(swarm, balance=False).eval()
    x = torch.randn(6, 16)
    compiled = torch.compile(net, backend='eager')
    torch.testing.assert_close(compiled(x), net(x))
    compiled(torch.randn(9, 16)).sum().backward()
    assert net[1].last.rows == 9 and net[1].last.backward_seconds


def test_what_no_graph_holds_says_so(swarm):
    net, x = model(swarm), torch.randn(4, 16, requires_grad=True)
    weights = dict(net.named_parameters())
    calls = net[1].stats.totals()['calls']
    for attempt in (lambda: torch.jit.trace(net, (x,)), lambda: torch.export.export(net, (x,), strict=False), lambda: torch.vmap(net)(x[:, None]),
                    lambda: torch.func.grad(lambda w: torch.func.functional_call(net, w, (x,)).sum())(weights), lambda: net.to('meta')(x.to('meta'))):
        with pytest.raises(LahError, match='cannot be .*#traced'): attempt()
    assert net[1].stats.totals()['calls'] == calls
    net = model(swarm)
    assert torch.func.functional_call(net, dict(net.named_parameters()), (x,)).shape == (4, 3)
    for y in net(x).sum(), net(x).square().sum():
        with pytest.raises(LahError, match='second derivative'): torch.autograd.grad(y, x, create_graph=True)


def test_experts_learn_when_nothing_else_does(swarm):
    layer = DMoE(swarm, 16, grid=(8, 8)).requires_grad_(False)
    before, x = updates(swarm), torch.randn(8, 16)
    layer(x).square().sum().backward()
    after = updates(swarm)
    assert after > before
    assert not layer.eval()(x).requires_grad
    with torch.no_grad(): assert not layer.train()(x).requires_grad


def test_batches_of_any_size(swarm):
    layer = DMoE(swarm, 16, grid=(8, 8), balance=False).eval()
    x = torch.randn(50_000, 16)
    with torch.no_grad(): y = layer(x)
    assert layer.last.rows == 50_000 and layer.last.answered == 200_000 and layer.last.experts <= 64
    with torch.no_grad(): torch.testing.assert_close(y[-10:], layer(x[-10:]))
    tokens, by_token = torch.randn(16, 512, 16, requires_grad=True), DMoE(swarm, 16, grid=(2, 8), route='token')
    by_token(tokens).sum().backward()
    assert by_token.last.answered == 4 * 16 * 512 and not by_token.last.failed and tokens.grad.any(-1).all()


def test_an_expert_runs_a_large_part_in_pieces():
    x, grad = torch.randn(50, 8), torch.randn(50, 8)
    whole, pieces = Expert('e.0', 'ffn', 8), Expert('e.0', 'ffn', 8)
    pieces.piece = 7
    torch.testing.assert_close(whole.forward_batch([(x, 0)])[0], pieces.forward_batch([(x, 0)])[0])
    torch.testing.assert_close(whole.backward_batch([(x, grad, 0)])[0], pieces.backward_batch([(x, grad, 0)])[0])
    torch.testing.assert_close(whole.flat, pieces.flat)
    assert whole.updates == pieces.updates == 1


@pytest.mark.parametrize('bad, why', [(float('nan'), 'NaN'), (float('inf'), 'infinity')])
def test_a_bad_row_is_named(swarm, bad, why):
    layer, x = DMoE(swarm, 16, grid=(8, 8)), torch.randn(4, 3, 16)
    x[2, 1, 5] = bad
    with pytest.raises(LahError, match=f'nothing was sent: row 2 of 4 has .*{why}'): layer(x)
    assert layer.last.calls == 0


def _in_a_fork(act):
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            began = time.monotonic()
            try: act()
            except PortalClosed as error: os.write(writer, f'{error} {time.monotonic() - began:.3f}'.encode())
        finally: os._exit(0)
    os.close(writer)
    with open(reader) as said: text = said.read()
    os.waitpid(pid, 0)
    return text


def test_a_fork_says_so_at_once(swarm):
    layer, x = DMoE(swarm, 16, grid=(8, 8)), torch.randn(4, 16)
    y = layer(x)
    for act in lambda: layer(x), lambda: y.sum().backward(), swarm.snapshot:
        text = _in_a_fork(act)
        assert 'fork' in text and '#forked' in text and float(text.split()[-1]) < 1
    _in_a_fork(swarm.close)
    assert layer(x).shape == x.shape and all(peer.alive for peer in swarm.peers)


def test_a_saved_model_joins_when_it_is_used(swarm):
    net, x = model(swarm, balance=False).eval(), torch.randn(4, 16)
    y = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    for again in torch.load(io.BytesIO(file.getvalue()), weights_only=False), pickle.loads(pickle.dumps(net)):
        assert 'when it is first used' in repr(again[1].swarm)
        try: torch.testing.assert_close(again(x), y)
        finally: again[1].swarm.close()
    assert copy.deepcopy(net)[1].swarm is swarm


@pytest.mark.slow
def test_another_process_joins_by_itself(swarm, tmp_path):
    net, x = model(swarm, balance=False).eval(), torch.randn(4, 16)
    torch.save((net, x, net(x).detach()), tmp_path / 'model.pt')
    code = ('import sys, torch\nnet, x, y = torch.load(sys.argv[1], weights_only=False)\n'
            'torch.testing.assert_close(net(x).detach(), y)\nprint(net[1].swarm)')
    said = subprocess.run([sys.executable, '-c', code, tmp_path / 'model.pt'], capture_output=True, text=True, timeout=60)
    assert 'peers known' in said.stdout, said.stderr


def test_a_model_whose_swarm_has_gone_can_try_again():
    swarm = Swarm.later(['/ip4/127.0.0.1/tcp/9'])  # nobody's address
    layer = DMoE(swarm, 16, grid=(8, 8))
    for _ in range(2):
        with pytest.raises(LahError): layer(torch.randn(2, 16))
    swarm.close()
    with pytest.raises(AttributeError, match='closed'): swarm.roster


def test_eval_reaches_the_experts(others):
    layer, x = DMoE(others, 16, grid=(2,), uid_prefix='drops', k=2, balance=False), torch.randn(8, 16)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    rows = x.clone().requires_grad_()
    layer(rows).sum().backward()
    assert rows.grad.any(1).all() and not layer.last.failed


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_finds_the_first_choice_again(swarm, reentrant):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), DMoE(swarm, 16, grid=(8, 8), k=2, balance=1.))
    layer, x = net[2], torch.randn(16, 16, requires_grad=True)
    for _ in range(2):
        y = checkpoint(net, x, use_reentrant=reentrant)
        exchange = list(layer._memory._alive.values())[-1]
        for _ in range(3): layer(torch.randn(16, 16))  # the balance moves on
        before, bias = layer.stats.totals(), layer.balance.bias1.clone()
        layer.zero_grad()
        y.square().sum().backward()
        after = layer.stats.totals()
        assert after['dispatches'] == before['dispatches'] and after['calls'] == before['calls'] + len(exchange.calls)
        assert torch.equal(layer.balance.bias1, bias) and not layer._memory._held
        # the gate's gradient, from the answers that came the first time
        gate = copy.deepcopy(layer.gate).requires_grad_()
        gate.zero_grad()
        scores = sum(s.gather(1, exchange.cells[..., i]) for i, s in enumerate(gate(exchange.rows)))
        (scores.softmax(-1)[..., None] * exchange.outputs).sum(1).square().sum().backward()
        torch.testing.assert_close(layer.gate.linear.weight.grad, gate.linear.weight.grad, rtol=1e-4, atol=1e-4)


def test_the_choice_stays_where_it_is_made(swarm):
    balance = Balance((2, 3))
    assert balance.to('meta').half().bias1.device.type == 'cpu' and balance.bias1.dtype == torch.float32
    pickle.loads(pickle.dumps(balance)).served(torch.tensor([[0, 1]]))
    layer = DMoE(swarm, 16, grid=(8, 8))
    x = torch.randn(4, 16, requires_grad=True)
    torch.set_default_device('meta')
    try: layer(x).sum().backward()
    finally: torch.set_default_device(None)
    assert x.grad.any() and layer.last.answered == 16


@pytest.fixture
def no_collector():
    "Python's collector off: what has no owner has to go by itself"
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_nothing_of_a_batch_outlives_it(swarm, no_collector):
    "No reference cycle holds tensors of a dispatch, forward or backward"
    layer = DMoE(swarm, 16, grid=(8, 8))
    def step():
        x = torch.randn(32, 16, requires_grad=True)
        y = layer(x)
        exchange = weakref.ref(y.grad_fn.next_functions[0][0].exchange)
        parts = [weakref.ref(exchange().outputs), *(weakref.ref(call) for call in exchange().calls)]
        y.square().sum().backward()
        return [exchange, *parts]
    def alive(refs): return [ref() for ref in refs if ref() is not None]
    def settled(refs):
        for _ in range(100):  # an audit may look at an answer for a while
            if not alive(refs): return True
            time.sleep(0.1)
    step()
    refs = [ref for _ in range(10) for ref in step()]
    assert len(refs) > 30 and settled(refs), [type(part) for part in alive(refs)]


def test_memory_stays_flat_without_the_collector():
    "Tensors of 16 MiB through the layer, again and again, in a process of its own"
    code = '''
import gc, psutil, torch
from lah_nb import DMoE, Swarm
torch.set_num_threads(1)
with Swarm.local(peers=1, experts='nop.[0:1]', expert_cls='nop', hidden_dim=2048) as swarm:
    layer, x = DMoE(swarm, 2048, grid=(1,), uid_prefix='nop', k=1), torch.randn(2048, 2048)
    gc.disable()
    used, before = [], psutil.Process().memory_info().rss
    for i in range(24):
        with torch.set_grad_enabled(i % 3 == 0): y = layer(x)
        if i % 3 == 0: y.sum().backward()
        del y
        used.append((psutil.Process().memory_info().rss - before) >> 20)
assert max(used) < 450, used  # with cycles, 48 more for each batch
'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=240)
