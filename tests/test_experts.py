"What would spoil the reading of `05_experts`: every class against plain torch, hostile states, seeds under threads"
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from lah_nb.mixture.ffn import FeedForward
from lah_nb.mixture.learning import BETAS
from lah_nb.mixture.classes import EXPERTS, Schema, expert_schema, load_expert_file, register_expert
from lah_nb.mixture.uids import MAX_UIDS, ExpertError, parse_uids, split_uid
from lah_nb.mixture.experts import BadGradient, Expert
from lah_nb.mixture.packed import load_expert, pack_expert, save_expert, unpack_expert

torch.set_num_threads(1)
PLAIN = {
    'adam': lambda p, lr: torch.optim.Adam(p, lr=lr, betas=BETAS),
    'amsgrad': lambda p, lr: torch.optim.Adam(p, lr=lr, betas=BETAS, amsgrad=True),
    'sgd': torch.optim.SGD}


@pytest.fixture
def registry():
    before = dict(EXPERTS)
    yield register_expert
    EXPERTS.clear()
    EXPERTS.update(before)


@pytest.mark.parametrize('optimizer', PLAIN)
@pytest.mark.parametrize('name, shape', [('ffn', (3, 16)), ('transformer', (3, 5, 16))])
@pytest.mark.parametrize('clip', [None, 0.5])
def test_equals_plain_torch(name, shape, optimizer, clip):
    torch.manual_seed(0)
    expert = Expert(f'{name}.1', name, 16, optimizer=optimizer, lr=1e-2, clip=clip)
    plain = EXPERTS[name].build(16).train()
    plain.load_state_dict(expert.module.state_dict())
    steps = PLAIN[optimizer](plain.parameters(), lr=1e-2)
    for _ in range(6):
        x, grad = torch.randn(shape), torch.randn(shape)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(expert.forward(x), plain(leaf).detach(), atol=1e-6, rtol=1e-6)
        gx = expert.backward(x, grad)
        steps.zero_grad()
        plain(leaf).backward(grad)
        if clip: nn.utils.clip_grad_norm_(plain.parameters(), clip)
        steps.step()
        torch.testing.assert_close(gx, leaf.grad, atol=1e-6, rtol=1e-6)
    for mine, theirs in zip(expert.module.parameters(), plain.parameters()): torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_several_callers_make_one_step():
    one, many = Expert('ffn.0', 'ffn', 16), Expert('ffn.0', 'ffn', 16)
    x, grad = torch.randn(6, 16), torch.randn(6, 16)
    whole = one.backward(x, grad)
    parts = many.backward_batch([(x[:1], grad[:1], 0), (x[1:4], grad[1:4], 5), (x[4:], grad[4:], 9)])
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(many.flat, one.flat, atol=1e-6, rtol=1e-6)
    assert many.updates == 1 and many.rows_backward == 6


def test_dropout_is_replayed_part_by_part(registry):
    @registry('dropping', example=lambda hidden_dim: torch.zeros(2, hidden_dim))
    class Dropping(nn.Module):
        def __init__(self, hidden_dim):
            super().__init__()
            self.linear = nn.Linear(hidden_dim, hidden_dim)
        def forward(self, x): return nn.functional.dropout(self.linear(x), 0.3)

    expert = Expert('dropping.0', 'dropping', 32, optimizer='sgd', lr=0.1, clip=None)
    weight = expert.module.linear.weight.detach().clone()
    parts = [(torch.randn(2, 32), seed) for seed in (3, 4)]
    ys = expert.forward_batch(parts)
    gxs = expert.backward_batch([(x, torch.ones(2, 32), seed) for x, seed in parts])
    masks = [(y != 0).float() / 0.7 for y in ys]
    for gx, mask in zip(gxs, masks): torch.testing.assert_close(gx, mask @ weight)
    step = sum(mask.T @ x for mask, (x, _) in zip(masks, parts))
    torch.testing.assert_close(expert.module.linear.weight.detach(), weight - 0.1 * step)


def test_neighbours_do_not_leak(registry):
    "Rows of a module that mixes rows are not shared between callers"
    @registry('centred', example=lambda hidden_dim: torch.zeros(2, hidden_dim))
    class Centred(nn.Module):
        def __init__(self, hidden_dim): super().__init__()
        def forward(self, x): return x - x.mean(0)
    mine, other = torch.randn(2, 4), torch.randn(3, 4)
    answers = Expert('centred.0', 'centred', 4).forward_batch([(mine, 0), (other, 0)])
    torch.testing.assert_close(answers[0], mine - mine.mean(0))


@pytest.mark.parametrize('optimizer', PLAIN)
def test_bad_gradients_change_nothing(optimizer):
    expert = Expert('ffn.0', 'ffn', 8, optimizer=optimizer)
    x, grad = torch.randn(2, 8), torch.randn(2, 8)
    expert.backward(x, grad)
    before = expert.state()
    for bad in float('nan'), float('inf'), -float('inf'):
        poison = grad.clone()
        poison[0, 0] = bad
        for args in (x, poison), (poison, grad):
            with pytest.raises(BadGradient, match='ffn.0'): expert.backward(*args)
    with pytest.raises(BadGradient, match='weights'): expert.backward(x * 1e30, torch.full_like(grad, 3e38))
    assert expert.refused == 7 and all(torch.equal(t, before[name]) for name, t in expert.state().items())
    assert expert.backward(x, grad).isfinite().all()


def test_adams_mean_of_the_gradients_is_remembered_only_where_it_is_more_than_the_last():
    x, grad = torch.randn(2, 8), torch.randn(2, 8)
    for betas, kept in ((0.0, 0.8), False), ((0.9, 0.99), True):
        expert, other = (Expert('ffn.0', 'ffn', 8, betas=betas, seed=seed) for seed in range(2))
        for _ in range(2): expert.backward(x, grad)
        state = expert.state()
        assert ('optimizer.exp_avg' in state) == kept
        # earlier versions wrote it in any case
        earlier = {'optimizer.exp_avg': torch.zeros_like(expert.flat)} | state
        other.load_state(earlier)
        assert torch.equal(unpack_expert(pack_expert(expert, earlier)).flat, expert.flat)
        assert torch.equal(expert.backward(x, grad), other.backward(x, grad)) and torch.equal(expert.flat, other.flat)
        assert all(torch.equal(t, other.state()[name]) for name, t in expert.state().items())


def test_state_of_strangers():
    expert = Expert('ffn.0', 'ffn', 8)
    expert.backward(torch.ones(1, 8), torch.ones(1, 8))
    good, before = expert.state(), expert.state()
    name = 'module.layers.0.weight'
    for bad in ({}, good | {'extra': torch.zeros(1)}, good | {name: torch.zeros(3)}, good | {name: good[name] * float('nan')},
                good | {'optimizer.exp_avg_sq': torch.zeros(5)}, {k: t for k, t in good.items() if k != 'optimizer.step'}):
        with pytest.raises(ExpertError): expert.load_state(bad)
    assert all(torch.equal(t, before[key]) for key, t in expert.state().items())
    with pytest.raises(ExpertError): Expert('ffn.0', 'ffn', 8, betas=(0.9, 0.99)).load_state(good | {'optimizer.exp_avg': torch.zeros(5)})
    weights_only = {key: t for key, t in good.items() if not key.startswith('optimizer.')}
    expert.load_state(weights_only)
    assert set(expert.state()) == set(weights_only)
    expert.backward(torch.ones(1, 8), torch.ones(1, 8))


@pytest.mark.parametrize('optimizer', PLAIN)
def test_saved_expert_goes_on_where_it_was(tmp_path, optimizer):
    expert, x, grad = Expert('ffn.1.2', 'ffn', 8, optimizer=optimizer), torch.randn(4, 8), torch.randn(4, 8)
    expert.backward(x, grad)
    save_expert(expert, tmp_path)
    save_expert(expert, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['ffn.1.2.safetensors']
    again = Expert('ffn.1.2', 'ffn', 8, optimizer=optimizer, seed=1)
    assert load_expert(again, tmp_path) and again.updates == 1
    assert torch.equal(again.backward(x, grad), expert.backward(x, grad)) and torch.equal(again.flat, expert.flat)
    assert again.module.layers[0].weight.untyped_storage().data_ptr() == again.flat.untyped_storage().data_ptr()


def test_uids_and_patterns():
    assert split_uid('lm.0.3.11', 2) == ('lm.0', (3, 11)) and split_uid('lm.0.3.11') == ('lm', (0, 3, 11))
    assert len(parse_uids('ffn.[0:256].[0:256]')) == MAX_UIDS
    for bad in ('ffn', '.1', '1.2', 'ffn.1.', 'ffn.-1', 'ffn.1/2', 'ffn.00', 'ffn.[0:257].[0:256]', 'ffn.[5:2]', 'ffn.[0:999999999].[0:999999999]', 'f' * 200 + '.1'):
        with pytest.raises(ExpertError): parse_uids(bad)


def test_schema_refuses_strangers():
    assert Schema.from_list([(64,), (64,), 'float32']) == Schema((64,), (64,))
    for bad in (None, [], [[64], [64]], [['a'], [64], 'float32'], [[True], [64], 'float32'], [[-2], [64], 'float32'], [[64] * 9, [64] * 9, 'float32'], [[64], [64], 3]):
        with pytest.raises(ExpertError): Schema.from_list(bad)
    assert not Schema((64,), (64,)).admits((64, 1)) and Schema((-1, 4), (-1, 4)).output((7, 4)) == (7, 4)


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    expert_schema('transformer', 16), Expert('ffn.0', 'ffn', 8)
    assert torch.equal(torch.randn(3), expected)


def test_experts_of_two_peers_in_one_process_keep_their_dropout(registry):
    @registry('noisy', example=lambda hidden_dim: torch.zeros(2, hidden_dim))
    class Noisy(nn.Module):
        def __init__(self, hidden_dim): super().__init__()
        def forward(self, x): return nn.functional.dropout(nn.functional.dropout(x, 0.2), 0.2)
    x, wrong = torch.ones(64, 64), []
    expected = [Expert('noisy.0', 'noisy', 64).forward(x, seed) for seed in range(4)]
    def work(seed):
        expert = Expert(f'noisy.{seed}', 'noisy', 64)
        for _ in range(30):
            if not torch.equal(expert.forward(x, seed), expected[seed]): wrong.append(seed)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong


def test_threads_do_not_share_gradients():
    "Within a thread all experts of one size share the memory of one gradient"
    experts = [Expert(f'ffn.{i}', 'ffn', 32) for i in range(4)]
    alone = [Expert(f'ffn.{i}', 'ffn', 32) for i in range(4)]
    x, grad = torch.randn(20, 3, 32), torch.randn(20, 3, 32)
    def work(expert):
        for step in range(20): expert.backward(x[step], grad[step])
    threads = [threading.Thread(target=work, args=(expert,)) for expert in experts]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for expert in alone: work(expert)
    assert all(torch.equal(a.flat, b.flat) for a, b in zip(experts, alone))
    assert alone[0].grad is alone[1].grad and experts[0].grad is not experts[1].grad


def test_starting_an_expert_does_not_import_the_compiler():
    "`torch._dynamo` costs every peer 70 MB and a second or more"
    code = ('import sys, torch\nfrom lah_nb.mixture.experts import Expert\nfor name, shape in dict(ffn=(2, 8), transformer=(2, 3, 8)).items():\n'
            '    Expert(name + ".0", name, 8).backward(torch.ones(shape), torch.ones(shape))\nassert "torch._dynamo" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_files_of_classes(tmp_path, registry):
    path = tmp_path / 'mine.py'
    path.write_text('import torch\nfrom lah_nb.mixture.classes import register_expert\n'
                    '@register_expert("mine", example=lambda h: torch.zeros(2, h))\nclass Mine(torch.nn.Linear):\n    def __init__(self, h): super().__init__(h, h)\n')
    assert load_expert_file(path) == ['mine'] == load_expert_file(str(path))
    assert Expert('mine.0', 'mine', 4).forward(torch.zeros(1, 4)).shape == (1, 4)
    (tmp_path / 'broken.py').write_text('1 / 0')
    with pytest.raises(ExpertError, match='ZeroDivisionError'): load_expert_file(tmp_path / 'broken.py')


def test_a_call_asks_for_a_part_of_the_rate():
    torch.manual_seed(0)
    x, grad = torch.randn(2, 8), torch.randn(2, 8)
    steps = []
    for rates in (), (0.5,), (0.25, 0.75):
        expert = Expert('ffn.0', 'ffn', 8, optimizer='sgd', lr=0.1, clip=None)
        before = expert.flat.clone()
        expert.backward_batch([(x, grad / max(1, len(rates)), 0, rate) for rate in rates] or [(x, grad, 0)])
        steps.append(expert.flat - before)
    assert torch.allclose(steps[1], steps[0] / 2, atol=1e-6) and torch.allclose(steps[2], steps[1], atol=1e-6)


@pytest.mark.parametrize('options', [dict(lr=-1), dict(lr=float('nan')), dict(betas=(0., 1.))])
def test_rates_that_cannot_be_are_refused(options):
    with pytest.raises(ExpertError, match='cannot learn'): Expert('ffn.0', 'ffn', 8, **options)


def test_an_owner_says_how_experts_learn(tmp_path):
    from lah_nb.mixture.learning import Learning
    learning = Learning(warmup=4, total_steps=12, final=0.5, weight_decay=0.1, follow=False)
    assert [round(learning.rate(n), 3) for n in (0, 3, 4, 8, 12, 99)] == [0.25, 1., 1., 0.75, 0.5, 0.5]
    ours, freely = Expert('e.0', 'ffn', 8, lr=0.1, optimizer='sgd', learning=learning), Expert('e.0', 'ffn', 8, lr=0.1, optimizer='sgd')
    x, grad, before = torch.randn(4, 8), torch.randn(4, 8), ours.flat.clone()
    for expert in ours, freely: expert.backward_batch([(x, grad, 0, 0.5)])
    # a quarter of the rate, whatever the trainer asks; half of it, as the trainer asks
    torch.testing.assert_close(ours.flat - before * (1 - 0.025 * 0.1), (freely.flat - before) / 2)
    save_expert(ours, tmp_path)
    untold, told = Expert('e.0', 'ffn', 8, optimizer='sgd'), Expert('e.0', 'ffn', 8, optimizer='sgd', learning=Learning())
    assert load_expert(untold, tmp_path) and load_expert(told, tmp_path)
    assert (untold.learning, told.learning, untold.updates) == (learning, Learning(), 1)
    for wrong in dict(warmup=-1), dict(warmup=5, total_steps=5), dict(final=2.), dict(weight_decay=-0.1):
        with pytest.raises(ExpertError, match='#options'): Learning(**wrong)
    for wrong in dict(lr=-1), dict(lr=float('nan')), dict(clip=0):
        with pytest.raises(ExpertError, match='#options'): Expert('e.0', 'ffn', 8, **wrong)


@pytest.mark.parametrize('device', ['meta', 'cuda:7', 'nonsense'])
def test_a_device_that_cannot_compute_is_found_out_first(device):
    with pytest.raises(ExpertError, match='#device'): Expert('e.0', 'ffn', 8, device=device)


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
@pytest.mark.parametrize('rows', [1, 7, 40])
def test_the_written_out_backward_learns_as_autograd_does(optimizer, rows):
    class Derived(FeedForward): pass  # inherits the method, and is not trusted to have the same forward
    register_expert('derived', example=lambda hidden_dim: torch.zeros(2, hidden_dim))(Derived)
    written, recorded = (Expert('ffn.0', name, 24, optimizer=optimizer, seed=3) for name in ('ffn', 'derived'))
    assert written.written and not recorded.written
    torch.manual_seed(rows)
    for _ in range(8):
        x, grad = torch.randn(rows, 24), torch.randn(rows, 24).bfloat16().float()
        gx, due = written.backward(x, grad), recorded.backward(x, grad)
        torch.testing.assert_close(gx, due, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(written.flat, recorded.flat, rtol=1e-4, atol=2e-5)
    for name, moment in written.moments.items(): torch.testing.assert_close(moment, recorded.moments[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(written.forward(x), recorded.forward(x), rtol=1e-4, atol=1e-5)
