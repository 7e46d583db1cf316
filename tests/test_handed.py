"Data as people have it: where others put their files, their own pictures and texts, data sets of torch and Hugging Face"
import gzip, struct

import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lah_nb import Trainer, load_digits, load_images, load_mnist, load_text
from lah_nb.errors import LahError
from lah_nb.training.data import data_folder, load_wikitext2


def idx(array): return struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, pack=gzip.compress, end='.gz', first=(5, 0, 4, 1, 9)):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = np.random.default_rng(0).integers(0, 255, (20, 28, 28), np.uint8), np.array([*first, *range(10), *range(5)], np.uint8)
    for part in 'train', 't10k':
        (folder / f'{part}-images-idx3-ubyte{end}').write_bytes(pack(idx(images)))
        (folder / f'{part}-labels-idx1-ubyte{end}').write_bytes(pack(idx(labels)))


@pytest.mark.parametrize('place', ['mnist', 'MNIST/raw', 'raw', ''])
@pytest.mark.parametrize('packed, end', [(True, '.gz'), (False, ''), (False, '.gz')])
def test_mnist_is_found_where_others_put_it(tmp_path, monkeypatch, place, packed, end):
    write_mnist(tmp_path / 'a' / place, gzip.compress if packed else bytes, end)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('LAH_DATA', '~/a')
    assert data_folder() == tmp_path / 'a'
    data = load_mnist(progress=False)
    assert (len(data), data.name) == (20, 'mnist') and torch.equal(load_images('~/a').x_test, data.x_test)


def test_fashion_mnist_is_named_as_such(tmp_path):
    write_mnist(tmp_path, first=(9, 0, 0, 3, 0))
    assert load_mnist(tmp_path).name == 'fashion-mnist'


def test_own_pictures():
    y = torch.arange(50) % 5
    data = load_images(torch.rand(50, 3, 4, 4), y, name='mine')
    assert (len(data), len(data.y_test), data.features, data.classes, data.name) == (40, 10, 48, 5, 'mine')
    for x, y in (torch.rand(5, 3), torch.rand(5)), (torch.rand(5, 3), torch.arange(4)), (torch.rand(2, 3), torch.arange(2)):
        with pytest.raises(LahError, match='#data'): load_images(x, y)


def test_own_text(tmp_path):
    file = tmp_path / 'poem.txt'
    file.write_text('a rose is a rose\n' * 40)
    data = load_text(file, length=8)
    assert (data.name, data.vocab[0], len(data.test)) == ('poem', 'a', 24)
    for text in '', 'one line only', '\n\n':
        file.write_text(text)
        with pytest.raises(LahError, match='nothing to predict'): load_text(file)
    file.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(LahError, match='UTF-8'): load_text(file)
    (tmp_path / 'wikitext-2').mkdir()
    for part in 'train', 'valid', 'test': (tmp_path / 'wikitext-2' / f'wiki.{part}.tokens').write_text('')
    with pytest.raises(LahError, match='nothing to predict'): load_wikitext2(tmp_path)


def trainer(model=None, **options): return Trainer(model or nn.Linear(3, 2), in_flight=2, batch_size=8, progress=False, **options)


class Endless(IterableDataset):
    def __iter__(self): return iter([(torch.ones(3), 1)] * 70)


@pytest.mark.parametrize('kind', [TensorDataset, lambda *parts: DataLoader(TensorDataset(*parts), batch_size=8, shuffle=True), lambda *parts: list(zip(*parts)),
                                  lambda x, y: [{'image': a, 'label': int(b)} for a, b in zip(x, y)]])
def test_a_trainer_takes_data_as_it_is(kind):
    x = torch.randn(64, 3)
    data = kind(x, (x[:, 0] > 0).long())
    t = trainer(lr=0.3)
    t.fit(data, epochs=5)
    assert t.step == 40
    held = data if not isinstance(data, list) else TensorDataset(x, (x[:, 0] > 0).long())  # a list is a list of batches
    assert t.evaluate(held, progress=False)['accuracy'] > 0.8


def test_a_stream_needs_steps():
    t = trainer()
    with pytest.raises(LahError, match=r'fit\(steps='): t.fit(Endless())
    t.fit(Endless(), steps=5)
    assert t.step == 5
    for bad in 7, {'train': []}, iter([]):
        with pytest.raises(LahError): t.fit(bad, steps=1)


def test_hugging_face_datasets():
    datasets = pytest.importorskip('datasets')
    rows = [[float(i % 2), 0., 0.] for i in range(32)]
    data = datasets.Dataset.from_dict({'features': rows, 'label': [i % 2 for i in range(32)]})
    for each in data, data.with_format('torch'), data.to_iterable_dataset():
        t = trainer()
        t.fit(each, steps=3)
        assert t.step == 3


@pytest.mark.parametrize('extent', [dict(steps=-1), dict(epochs=-1), dict(seconds=-2.), dict(steps=float('nan')), dict(steps=5, eval_every=-1)])
def test_what_no_fit_can_be(extent):
    with pytest.raises(LahError, match='cannot have'): trainer().fit(load_digits(), **extent)


@pytest.mark.parametrize('extent', [dict(steps=0), dict(epochs=0), dict(seconds=0)])
def test_nothing_to_do(extent):
    t = trainer(nn.Linear(64, 10))
    assert len(t.fit(load_digits(), **extent)) == t.step == 0


class Regression(nn.Linear):
    def loss(self, x, y): return (self(x) - y).square().mean()


def test_targets_below_zero_count():
    x = torch.tensor([[1.], [1.]])
    model = Regression(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    found = trainer(model).evaluate([(x, torch.tensor([[-2.], [-2.]])), (x, torch.tensor([[1.], [1.]]))], progress=False)
    assert found['loss'] == 2.5 and 'perplexity' not in found


def test_a_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    t = trainer()
    assert t.save('~/run.safetensors') == tmp_path / 'run.safetensors'
    t.load('~/run.safetensors')


def test_a_scheduler_of_torch_is_the_schedule():
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=20)
    with pytest.raises(LahError, match='schedule=scheduler'): trainer(model, optimizer=optimizer)
    with pytest.raises(LahError, match='another optimizer'): trainer(model, schedule=scheduler)
    t = Trainer(model, optimizer, schedule=scheduler, in_flight=1, progress=False)
    t.fit(load_digits(), steps=30)
    lrs = t.history['lr'].tolist()
    assert max(lrs) > 0.4 > lrs[0] and lrs[-1] < 0.01 and t.step == 30
