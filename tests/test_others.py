"The trainers that people use already, each with a `DMoE` in the model; where one is not installed, its test is skipped"
import warnings

import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lah_nb import DMoE, load_digits


class Model(nn.Module):
    def __init__(self, swarm):
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(64, 16), DMoE(swarm, 16, grid=(8, 8)), nn.Linear(16, 10)

    def forward(self, x): return self.last(self.experts(self.first(x)))


@pytest.fixture
def model(swarm):
    torch.manual_seed(0)
    return Model(swarm)


@pytest.fixture(scope='module')
def data(): return TensorDataset(load_digits().x_train, load_digits().y_train)


def right(model, n=200):
    digits = load_digits()
    with torch.no_grad(): return (model.eval()(digits.x_test[:n]).argmax(-1) == digits.y_test[:n]).float().mean().item()


def learned(model, steps):
    "The trunk, the gate and the experts"
    totals = model.experts.stats.totals()
    return totals['dispatches'] >= steps and totals['backward_seconds'] > 0 and right(model) > 0.5


STEPS = 40


def test_a_plain_loop(model, data):
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for (x, y), _ in zip(DataLoader(data, batch_size=32, shuffle=True), range(STEPS)):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert learned(model, STEPS)


@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed'])
def test_lightning(model, data, tmp_path, precision):
    L = pytest.importorskip('lightning')

    class Lit(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
        def training_step(self, batch, i): return nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), 5e-3)

    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = L.Trainer(max_steps=STEPS, accelerator='cpu', precision=precision, default_root_dir=tmp_path, **options)
        trainer.fit(Lit(), DataLoader(data, batch_size=32, shuffle=True))
    assert trainer.global_step == STEPS and learned(model, STEPS)


def test_accelerate(model, data):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision='bf16')
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=32, shuffle=True))
    for (x, y), _ in zip(loader, range(STEPS)):
        loss = nn.functional.cross_entropy(prepared(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert learned(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), STEPS)


def test_hugging_face_trainer(model, data, tmp_path):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')

    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self, pixels, labels):
            logits = self.model(pixels)
            return dict(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    rows = [dict(pixels=x, labels=y) for x, y in data]
    args = transformers.TrainingArguments(str(tmp_path), max_steps=STEPS, per_device_train_batch_size=32, learning_rate=5e-3, report_to=[],
                                          use_cpu=True, save_strategy='no', disable_tqdm=True, logging_strategy='no', remove_unused_columns=False)
    transformers.Trainer(Scored(), args, train_dataset=rows).train()
    assert learned(model, STEPS)
    transformers.Trainer(Scored(), args).save_model(tmp_path / 'saved')  # safetensors of the gate and the trunk
    assert any((tmp_path / 'saved').iterdir())
