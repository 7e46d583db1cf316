"Races, interrupts, failures and checkpoints of the trainer"
import contextlib, copy, heapq, math, os, random, signal, threading, time
from types import SimpleNamespace

import pytest
import torch
from conftest import until
from torch import nn

from lah_nb.training import ImageData, TrainingError, in_flight
from lah_nb.training.fitting import Plan
from lah_nb.training.pace import Pace, Worked
from lah_nb.training import pace as pacing, sharing
from lah_nb.training.sharing import Common, Post
from lah_nb import CausalTransformer, Classifier, Trainer, constant, cosine, dense_ffn
from lah_nb.errors import LahError

torch.set_num_threads(1)
OURS = 'lah-batch'
running = lambda: [t.name for t in threading.enumerate() if t.name.startswith(OURS)]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not running()


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 6, generator=g), torch.randint(3, (300,), generator=g)
    return ImageData(x[:250], y[:250], x[250:], y[250:], 3, 'noise')


class Layer(nn.Module):
    "A layer that the copies of a model share, as they share remote experts; `act` is called with the number of the call"
    def __init__(self, act): super().__init__(); self.act, self.calls, self.lock = act, 0, threading.Lock()
    def __deepcopy__(self, memo): return self
    def forward(self, x):
        with self.lock: self.calls = n = self.calls + 1
        self.act(n)
        return x


def small(*layers): torch.manual_seed(0); return Classifier(layers, 6, 8, 3)


def test_gradients_are_those_of_the_weights_a_batch_started_with(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), Layer(lambda n: time.sleep(0.001 * (n % 7))))
    start = copy.deepcopy(model[0].state_dict())
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.5), in_flight=5, staleness=20, clip=float('inf'), schedule=constant, warmup=0, progress=False)
    history = trainer.fit(images, steps=60)
    assert history.staleness.max() > 1 and sorted(history.batch) == list(range(60))
    weights = [(start['weight'], start['bias'])]
    for row in history.itertuples():
        w, b = (t.clone().requires_grad_() for t in weights[row.step - 1 - row.staleness])
        x, y = images.batch(row.batch, 32)
        nn.functional.cross_entropy(x @ w.T + b, y).backward()
        weights.append((weights[-1][0] - 0.5 * w.grad, weights[-1][1] - 0.5 * b.grad))
    assert torch.allclose(weights[-1][0], model[0].weight, atol=1e-5)


@pytest.mark.slow
def test_staleness_stays_below_the_batches_in_flight_when_all_take_as_long(images):
    history = Trainer(small(Layer(lambda n: time.sleep(0.005))), in_flight=4, staleness=4, progress=False).fit(images, steps=60)
    assert 1 < history.staleness.mean() < 4.5


@pytest.mark.slow
def test_batches_in_flight_hide_latency(images):
    run = lambda n: Trainer(small(Layer(lambda _: time.sleep(0.02))), in_flight=n, progress=False).fit(images, steps=40).seconds.iloc[-1]
    assert run(8) < run(1) / 3


@pytest.mark.slow
def test_interrupt_by_signal(images):
    trainer = Trainer(small(Layer(lambda n: time.sleep(0.02))), progress=False)
    for _ in range(3):
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt): trainer.fit(images, steps=10_000)
        assert time.monotonic() - began < 2 and not running()
    history = trainer.fit(images, steps=20)
    assert history.step.tolist() == list(range(1, trainer.step + 1)) and history.batch.is_unique
    assert history.seconds.is_monotonic_increasing


@pytest.mark.slow
def test_batches_that_do_not_come_home_are_left_and_done_again(images):
    stuck, waiting, killed = threading.Event(), [], []
    def act(n):
        if n > 10:
            waiting.append(n)
            stuck.wait(20)
    layer = Layer(act)
    trainer = Trainer(small(layer), drain=0.3, progress=False)
    def interrupt():
        until(lambda: trainer.step == 10 and len(waiting) == 4)
        killed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt): trainer.fit(images, steps=20)
    assert time.monotonic() - killed[0] < 2 and trainer.step == 10 and len(running()) == 4
    left, before = [t for t in threading.enumerate() if t.name.startswith(OURS)], copy.deepcopy(trainer.model.state_dict())
    layer.act = lambda n: None
    stuck.set()
    for t in left: t.join(5)
    assert trainer.step == 10 and all(before[k].equal(v) for k, v in trainer.model.state_dict().items())
    history = trainer.fit(images)
    assert sorted(history.batch) == list(range(20))


def test_failures_are_borne_and_every_batch_is_done(images):
    def act(n):
        if n % 3 == 0: raise LahError('TooFewExperts')
    trainer = Trainer(small(Layer(act)), progress=False)
    history = trainer.fit(images, steps=40)
    assert sorted(history.batch) == list(range(40)) and len(trainer.failures) >= 15


@pytest.mark.parametrize('error', [ValueError('a bug'), LahError('nobody answers')])
def test_an_error_comes_up_and_nothing_is_lost(images, error):
    def act(n):
        if n > 12: raise error
    layer = Layer(act)
    trainer = Trainer(small(layer), retries=2, progress=False)
    with pytest.raises(type(error), match=str(error)) as e: trainer.fit(images, steps=30)
    if hasattr(e.value, '__notes__'): assert 'Nothing of it was applied' in e.value.__notes__[0]
    assert trainer.step == 12 and not running()
    layer.act = lambda n: None
    assert sorted(trainer.fit(images).batch) == list(range(30))


def test_a_swarm_that_is_out_of_reach_is_waited_for(images):
    "It is being looked for: however often batches fail meanwhile, fit goes on"
    swarm = type('Swarm', (), {'cut_off': False})()
    def act(n):
        swarm.cut_off = 12 < n <= 20
        if swarm.cut_off: raise LahError('nobody answers')
    layer = Layer(act)
    layer.swarm = swarm
    trainer = Trainer(small(layer), in_flight=4, retries=2, progress=False)
    assert sorted(trainer.fit(images, steps=30).batch) == list(range(30)) and not trainer.waiting


def test_an_error_in_on_step(images):
    trainer = Trainer(small(), progress=False)
    def on_step(row):
        if row['step'] == 5: raise RuntimeError('mine')
    with pytest.raises(RuntimeError, match='mine'): trainer.fit(images, steps=30, on_step=on_step)
    assert not running() and trainer.fit(images).step.iloc[-1] == 30


def test_on_step_sees_every_step_in_order(images):
    seen = []
    Trainer(small(), progress=False).fit(images, steps=50, eval_every=20, on_step=lambda row: seen.append(row['step']))
    assert seen == list(range(1, 51))


@pytest.mark.slow
def test_the_ends_of_a_fit(images):
    trainer = Trainer(small(), progress=False)
    assert len(trainer.fit(images)) == 8 and len(trainer.fit(images, epochs=2.5)) == 28 and len(trainer.fit(images, steps=1)) == 29
    began = time.monotonic()
    history = trainer.fit(images, seconds=0.3, eval_every=50)
    assert 0.25 < time.monotonic() - began < 1.5 and len(history) > 29
    assert history.test_accuracy.notna().sum() == trainer.step // 50


def test_schedules_follow_steps_and_seconds(images):
    trainer = Trainer(small(), lr=0.1, schedule=cosine(0.1, 0), in_flight=1, progress=False)
    lr = trainer.fit(images, steps=101).lr
    assert lr[0] == 0 and lr.max() == pytest.approx(0.1, rel=0.05) and lr.iloc[-1] < 1e-3
    lr = trainer.fit(images, seconds=0.5).lr[101:]
    assert lr.max() == pytest.approx(0.1, rel=0.05) and lr.iloc[-1] < 1e-2


def test_a_nan_gradient_is_refused(images):
    x = images.x_train.clone()
    x[images.batch(3, 32)[0][:, None].eq(x[None]).all(-1).any(0)] = float('nan')
    data = ImageData(x, *list(vars(images).values())[1:])
    trainer = Trainer(small(), in_flight=1, retries=8, progress=False)
    trainer.fit(data, steps=6)
    assert trainer.failures and all(isinstance(e, TrainingError) for _, e in trainer.failures) and all(p.isfinite().all() for p in trainer.model.parameters())


def test_buffers_come_back(images):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = Trainer(model, in_flight=1, progress=False)  # with more, a batch that began early may end last
    trainer.fit(images, steps=20)
    assert model[1].num_batches_tracked == 20 and not model[1].running_mean.eq(0).all()
    assert model.training and set(trainer.evaluate(images)) == {'loss', 'accuracy'} and model[1].num_batches_tracked == 20


def test_evaluate_is_what_one_batch_would_say(images):
    trainer = Trainer(small(dense_ffn(8)), progress=False)
    result = trainer.evaluate(images, batch_size=7)
    with torch.no_grad(): logits = trainer.model(images.x_test)
    assert result['loss'] == pytest.approx(nn.functional.cross_entropy(logits, images.y_test).item(), abs=1e-5)
    assert result['accuracy'] == pytest.approx((logits.argmax(1) == images.y_test).float().mean().item())


def test_evaluate_bears_a_failure_and_shows_a_lasting_one(images):
    def once(n):
        if n == 2: raise LahError('gone')
    assert 'loss' in Trainer(small(Layer(once)), progress=False).evaluate(images, batch_size=10)
    def always(n): raise LahError('gone')
    with pytest.raises(LahError, match='gone'): Trainer(small(Layer(always)), progress=False).evaluate(images, batch_size=10)


def test_a_checkpoint_in_the_middle_of_a_fit(images, tmp_path):
    trainer = Trainer(small(Layer(lambda n: time.sleep(0.002))), progress=False)
    trainer.fit(images, steps=30, eval_every=7, on_step=lambda row: row['step'] == 12 and trainer.save(tmp_path / 'mid'))
    again = Trainer(small(Layer(lambda n: None)), progress=False).load(tmp_path / 'mid')
    assert 12 <= again.step < 18 and again.history.step.tolist() == list(range(1, again.step + 1))
    assert sorted(again.fit(images).batch) == list(range(30))


@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), lambda ps: torch.optim.Adam(ps, 1e-2, amsgrad=True), lambda ps: torch.optim.Adagrad(ps, 0.1)])
def test_any_optimizer_is_saved(images, tmp_path, make):
    def trainer():
        model = small(dense_ffn(8), nn.Dropout(0.3))
        return Trainer(model, make(model.parameters()), in_flight=1, progress=False)
    a = trainer()
    a.fit(images, steps=5)
    a.save(tmp_path / 'x')
    expected = a.fit(images, steps=5).loss.tolist()
    b = trainer().load(tmp_path / 'x')
    assert b.fit(images, steps=5).loss.tolist() == expected


def test_a_damaged_checkpoint_changes_nothing(images, tmp_path):
    trainer = Trainer(small(), progress=False)
    trainer.fit(images, steps=5)
    raw = trainer.save(tmp_path / 'x').read_bytes()
    before = copy.deepcopy(trainer.model.state_dict())
    for damaged in (b'', raw[:100], raw[:-9], b'\xff' * 500):
        (tmp_path / 'y').write_bytes(damaged)
        with pytest.raises(TrainingError, match='not a checkpoint'): trainer.load(tmp_path / 'y')
    with pytest.raises(TrainingError): trainer.load(tmp_path / 'nothing')
    assert trainer.step == 5 and all(before[k].equal(v) for k, v in trainer.model.state_dict().items())


def test_tied_weights_are_saved_once(tmp_path):
    model = CausalTransformer([dense_ffn(64)], 50, dim=16)
    size = Trainer(model, progress=False).save(tmp_path / 'x').stat().st_size
    assert size < 4 * 1.1 * sum(p.numel() for p in model.parameters()) + 20_000
    assert not [p.name for p in tmp_path.iterdir() if p.name != 'x']


def test_in_flight_stops_when_its_caller_leaves():
    began = []
    results = in_flight(lambda job, slot: began.append(job) or time.sleep(0.01), iter(range(10_000)).__next__, 3)
    with contextlib.closing(results):
        for _ in results: break
    n = len(began)
    assert n < 20 and not running()


def test_in_flight_passes_on_a_take_that_fails():
    def take(): raise RuntimeError('no more')
    assert [str(error) for _, _, error in in_flight(lambda job, slot: job, take, 2)] == ['no more'] * 2


def test_constant(): assert constant(0.3) == 1


@pytest.mark.parametrize('n, steps, filling, hurried', [(2, 20, 1000., True), (2, 20, 2., False), ('auto', 40, 1000., True), ('auto', 40, 2., False)])
def test_calls_are_made_several_times_where_peers_are_idle_and_no_more_may_be_in_flight(monkeypatch, images, n, steps, filling, hurried):
    layer, hurries = Layer(lambda n: hurries.append(layer.hurry)), []
    layer.expert_rate, layer.report = 1., SimpleNamespace(filling=filling, expert_staleness=None)
    monkeypatch.setattr(Worked, 'spares', True)
    Trainer(small(layer), in_flight=n, progress=False).fit(images, steps=steps)
    assert not hurries[0] and len(hurries) == steps and hurries[-1] == hurried
    monkeypatch.setattr(Worked, 'spares', False)
    Trainer(small(layer), in_flight=n, progress=False).fit(images, steps=steps)
    assert hurries[-1] is False


def test_the_last_batches_of_a_fit_are_in_a_hurry_on_their_way_back(monkeypatch, images):
    monkeypatch.setattr(Pace, 'home', lambda self, now, **about: None)  # eight in flight, where forty may be
    monkeypatch.setattr(Worked, 'spares', True)  # though this process fills its core, and is seen to if that takes two seconds
    hurries = []
    class Watched(Layer):
        def forward(self, x):
            y = super().forward(x) * 1.
            y.register_hook(lambda grad: hurries.append(self.hurry))
            return y
    layer = Watched(lambda n: time.sleep(0.002))
    layer.expert_rate, layer.report = 1., SimpleNamespace(filling=100., expert_staleness=None)
    trainer = Trainer(small(layer), progress=False)
    trainer.fit(images, steps=400)
    assert trainer.in_flight == 8 and len(hurries) == 400 and not any(hurries[:390]) and hurries[-1]


@pytest.mark.parametrize('seconds, spares', [(1.7, True), (1.9, False)])  # of one core's two between two looks
def test_a_process_that_fills_its_core_has_no_time_to_spare(monkeypatch, seconds, spares):
    wall, worked = [10.], [3.]
    monkeypatch.setattr(pacing, 'time', SimpleNamespace(monotonic=lambda: wall[0], process_time=lambda: worked[0]))
    own = Worked()
    wall[0], worked[0] = 11., 4.
    assert own.spares  # it has not looked yet
    wall[0], worked[0] = 12., 3. + seconds
    assert own.spares == spares
    wall[0] = 14.
    assert own.spares


def test_two_threads_may_ask_at_the_same_moment_whether_there_is_time_to_spare(monkeypatch):
    wall, asked = [0.], []
    def process_time():
        asked.append(1)
        if len(asked) == 2: assert own.spares  # another thread comes in between
        return 0.
    monkeypatch.setattr(pacing, 'time', SimpleNamespace(monotonic=lambda: wall[0], process_time=process_time))
    own = Worked()
    wall[0] = 3.
    assert own.spares and len(asked) == 3


@pytest.mark.parametrize('filling, idle', [(1000., True), (100., False)])
def test_fewer_in_flight_are_not_tried_where_peers_are_idle(filling, idle):
    pace, now, least = Pace(64, most=64), 0., 64
    pace._rushing = False
    for i in range(4000):
        now += 1 / pace.n
        pace.home(now, filling=filling)
        least = min(least, pace.n)
    assert (least == 64) == idle


def test_more_in_flight_are_tried_again_where_peers_are_idle():
    pace, now = Pace(16, most=64), 0.
    pace._rushing = False
    for pays in False, True:
        for i in range(3000):
            now += 1 / (pace.n if pays else 16)
            pace.home(now, filling=1000.)
        assert pace.n == (64 if pays else 16)


def test_who_shares_has_fewer_in_flight_by_as_many_as_there_are_and_looks_again_when_they_change():
    pace = Pace(64, most=256)
    pace.bound(256., 4)
    assert pace.n == 16
    pace.bound(256., 4)
    for i in range(40): pace.home(i / 10, elsewhere=3.)
    assert pace.n == 16 and pace._count == 39  # nobody rushes: each is one of its own and three of others, by four
    for _ in range(3): pace.turns(1200.)
    assert pace.n == 100  # but leaps
    pace.bound(30., 8)
    assert pace.n == 30
    pace.bound(256., 1)
    assert pace.n == 240


def test_a_leap_that_was_too_short_is_made_up_for_in_one_trial():
    pace, now, seen = Pace(), 0., []
    for _ in range(3): pace.turns(360.)
    for i in range(300):
        now += 6. / pace.n  # each is away for six seconds, however many are
        pace.home(now, filling=1200.)
        if pace.n not in seen[-1:]: seen.append(pace.n)
    assert seen[:2] == [30, 200], seen


def test_no_more_in_flight_than_either_end_of_a_fit_allows(images):
    trainer = Trainer(small(), progress=False)
    def most(**ends):
        trainer.fit(images, **ends)
        return trainer.pace.most
    assert (most(steps=300), most(seconds=0.2), most(steps=10**6, seconds=0.2), most(steps=60, seconds=60.), most(steps=2000)) == (30, 64, 64, 6, 200)
    trainer.sharing = SimpleNamespace(others=3)
    trainer.plan = Plan(0, None, 10., 0.)
    trainer._bound(trainer.pace)
    assert trainer.pace.most == 16


def test_steering_from_elsewhere(images):
    seen = threading.Event()
    trainer = Trainer(small(Layer(lambda n: time.sleep(0.002))), progress=False)
    trainer.start(images, steps=30, eval_every=10, on_step=lambda row: seen.set())
    with pytest.raises(TrainingError, match='already'): trainer.start(images)
    assert seen.wait(10)
    with pytest.raises(TrainingError, match='already'): trainer.fit(images)
    trainer.pause()
    trainer.in_flight = 7
    time.sleep(0.3)
    at, seconds = trainer.step, trainer.seconds
    time.sleep(0.2)
    assert (trainer.step, trainer.seconds) == (at, seconds) and (at == 30 or trainer.state == 'paused')
    trainer.resume()
    assert trainer.wait(20) and trainer.step == 30 and trainer.state == 'idle' and trainer.error is None
    assert trainer.history.test_accuracy.notna().sum() == 3 and sorted(trainer.history.batch) == list(range(30))


def test_stop_leaves_the_rest_to_the_next_fit(images):
    trainer = Trainer(small(Layer(lambda n: time.sleep(0.002))), progress=False).start(images, steps=400)
    while trainer.step < 5: time.sleep(0.005)
    trainer.stop()
    assert trainer.state == 'idle' and 5 <= trainer.step < 400
    assert len(trainer.fit(images)) == 400  # the plan goes on


def test_a_background_fit_that_fails_says_so(images):
    def act(n):
        if n > 3: raise LahError('the swarm is gone')
    trainer = Trainer(small(Layer(act)), retries=1, progress=False).start(images, steps=50)
    assert trainer.wait(20) and 'swarm is gone' in str(trainer.error) and trainer.state == 'idle'


def test_a_gradient_is_never_many_steps_old(images):
    trainer = Trainer(small(Layer(lambda n: time.sleep(0.01))), in_flight=64, progress=False)
    history = trainer.fit(images, steps=400)
    assert sorted(history.batch) == list(range(400))
    assert history.staleness_samples.iloc[100:].mean() > 24 * 32  # tens of batches pass each one in flight ...
    assert history.staleness.iloc[100:].mean() < 4 and 8 < trainer.updates < 60  # ... and few steps


def test_a_step_can_wait_for_most_of_what_is_in_flight(images):
    def act(n):
        time.sleep(0.002 * (n % 5))
        if n % 11 == 0: raise LahError('nobody answered')
    trainer = Trainer(small(Layer(act)), in_flight=8, staleness=0, progress=False)
    trainer.fit(images, steps=60)
    trainer.start(images, steps=60)
    while trainer.step < 90: time.sleep(0.005)
    trainer.pause()
    deadline = time.monotonic() + 10
    while trainer.flying and time.monotonic() < deadline: time.sleep(0.01)
    assert not trainer.flying
    trainer.resume()
    assert trainer.wait(20) and trainer.error is None
    history = trainer.history
    assert sorted(history.batch) == list(range(120)) and len(trainer.failures) >= 10
    assert history.staleness.mean() < 0.6 and trainer.updates <= 120 / 6 + 12  # a step for six, and some for fewer where nobody was left to wait for


def test_gradients_that_wait_when_a_fit_ends_become_a_step(images):
    trainer = Trainer(small(), in_flight=64, progress=False)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.fit(images, steps=3)
    assert trainer.updates == 1 and not any(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))


def test_rates_of_trunk_and_experts_rise_and_fall_together(images):
    class Remote(nn.Module):
        expert_rate, report = 1., None
        def forward(self, x): seen.append(self.expert_rate); return x
    seen = []
    trainer = Trainer(small(Remote()), lr=0.1, in_flight=1, warmup=10, progress=False)
    history = trainer.fit(images, steps=200)
    assert seen == pytest.approx((history.lr / 0.1).tolist(), abs=1e-6)
    assert seen[0] == pytest.approx(0.1) and max(seen) > 0.99 and 0 < seen[-1] < 0.03


def test_each_step_of_one_is_taken_once_by_all_though_posts_are_missed_and_come_late(monkeypatch):
    monkeypatch.setattr(sharing, 'TOGETHER', 0.)
    monkeypatch.setattr(sharing, 'CALM', 10**9)
    rng, at = random.Random(0), {name: torch.zeros(3) for name in 'abc'}
    common, updates = {name: Common(w) for name, w in at.items()}, dict.fromkeys(at, 0)
    pinned = {name: [] for name in at}
    def meet(name, missing, old=()):  # old: whose post before the last is read, on a board that has missed the last
        for other in at: pinned[other] = [*pinned[other][-1:], Post(at[other], common[other].moved(at[other]), updates=updates[other])]
        others = {other: pinned[other][0 if other in old else -1] for other in at if other not in (name, *missing)}
        at[name] = at[name] + common[name].take(pinned[name][-1], others)
    for name in at: meet(name, ())  # they see each other for the first time
    steps = torch.zeros(3)
    for _ in range(200):
        name, step = rng.choice('abc'), torch.randn(3)
        at[name], steps, updates[name] = at[name] + step, steps + step, updates[name] + 1
        meet(rng.choice('abc'), rng.sample('abc', rng.choice((0, 0, 1, 2, 3))), rng.sample('abc', rng.choice((0, 0, 1))))
    for name in at: meet(name, ())
    for name in at: assert torch.allclose(at[name], steps, atol=1e-3)


def test_many_steps_between_two_meetings_are_shortened_for_all_alike(monkeypatch):
    monkeypatch.setattr(sharing, 'TOGETHER', 0.)
    ann, bob = torch.zeros(2), torch.zeros(2)
    of_ann, of_bob = Common(ann), Common(bob)
    for n in (0, 16):
        if n: ann, bob = ann + torch.tensor([1., 0.]), bob + torch.tensor([0., 1.])
        posts = Post(ann, of_ann.moved(ann), updates=n), Post(bob, of_bob.moved(bob), updates=n)
        ann, bob = ann + of_ann.take(posts[0], dict(bob=posts[1])), bob + of_bob.take(posts[1], dict(ann=posts[0]))
    assert torch.allclose(ann, bob) and torch.allclose(ann, torch.full((2,), math.sqrt(sharing.CALM / 32)))


@pytest.mark.slow
def test_trainers_that_share_a_name_keep_together():
    "Two trainers, then one that comes late: all end near each other, and no NaN is averaged"
    from lah_nb import DMoE, Swarm
    data = ImageData(torch.randn(256, 6), torch.randint(3, (256,)), torch.randn(32, 6), torch.randint(3, (32,)), 3, 'noise')
    weights = lambda trainer: torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    with Swarm.local(peers=2, experts='ffn.[0:4]', hidden_dim=8) as swarm, contextlib.ExitStack() as stack:
        def trainer(seed, share='noise', features=6):
            torch.manual_seed(seed)
            layer = DMoE(stack.enter_context(Swarm.join(swarm.addrs)), 8, grid=(4,), k=2)
            made = Trainer(Classifier([layer], features, 8, 3), batch_size=8, in_flight=2, lr=1e-2, share=share, progress=False)
            return made
        ann, bob, alone = trainer(0), trainer(1), trainer(2, share=None)
        for each in ann, bob, alone: each.start(data, seconds=5.)
        for each in ann, bob, alone: assert each.wait(60) and each.error is None
        assert ann.sharing.meetings >= 2 and bob.sharing.meetings >= 2
        apart = (weights(ann) - weights(alone)).norm()
        assert (weights(ann) - weights(bob)).norm() < apart / 4
        late, ill = trainer(3), trainer(4)
        for each in ann, bob: each.sharing.meet()
        late.sharing.begin()
        assert (weights(late) - weights(ann)).norm() < apart / 10  # it may have begun where Bob is
        assert late.sharing.rate in [pytest.approx(each._own_rate(), abs=1e-6) for each in (ann, bob)]
        assert (ann.sharing.eldest is None) != (bob.sharing.eldest is None)
        with torch.no_grad(): next(ill.model.parameters()).fill_(float('nan'))
        ill.sharing.meeting.exchange(Post(weights(ill), weights(ill), samples=8, rate=1.))
        ann.sharing.meet()
        assert weights(ann).isfinite().all() and 'not finite' in str(ann.sharing.meeting.refused)
        other, before = trainer(5, features=5), time.monotonic()
        other.sharing.begin()
        assert 'other weights' in str(other.sharing.meeting.refused) and time.monotonic() - before < sharing.MEET_WITHIN / 2  # nobody to wait for


@pytest.mark.slow
def test_trainers_that_begin_at_one_moment_and_far_away_come_together():
    from lah_nb import DMoE, Swarm
    from lah_nb.network.weather import Weather
    data = ImageData(torch.randn(256, 6), torch.randint(3, (256,)), torch.randn(32, 6), torch.randint(3, (32,)), 3, 'noise')
    weights = lambda trainer: torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    with Swarm.local(peers=3, experts='ffn.[0:4]', hidden_dim=8) as swarm, contextlib.ExitStack() as stack:
        def trainer(seed):
            torch.manual_seed(seed)
            layer = DMoE(stack.enter_context(Swarm.join(swarm.addrs)), 8, grid=(4,), k=2)
            stack.enter_context(Weather(delay=0.5, drop=0.1, seed=seed).over(layer.swarm))
            return Trainer(Classifier([layer], 6, 8, 3), batch_size=8, in_flight=4, lr=1e-2, share='noise', progress=False)
        trainers = [trainer(seed) for seed in range(3)]
        apart = (weights(trainers[0]) - weights(trainers[1])).norm()
        for each in trainers: each.start(data, seconds=25.)
        for each in trainers: assert each.wait(60) and each.error is None
        assert len({each.sharing.line for each in trainers}) == 1 and all(each.updates for each in trainers)
        for each in trainers[1:]: assert (weights(trainers[0]) - weights(each)).norm() < apart / 8


def test_whose_first_batches_fail_has_many_in_flight_soon_where_they_travel_for_seconds():
    for seed in range(5):
        rng, pace, flying, now = random.Random(seed), Pace(), [], 0.
        pace.failed()
        pace.failed()
        while now < 120.:
            while len(flying) < pace.n: heapq.heappush(flying, now + rng.uniform(4., 10.))
            now = heapq.heappop(flying)
            pace.home(now)
        assert pace.n >= 32, seed
