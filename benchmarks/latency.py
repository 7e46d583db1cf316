"""What latency, lost calls and many batches in flight cost: MNIST through a real swarm of four processes on this computer.

    LAH_DATA=... python benchmarks/latency.py [--rows 64:0:0:1 auto:200:0.1:1 ...] [--steps N] [--seeds N] [--json] [--keep FILE]

A row is IN_FLIGHT:DELAY_MS:DROP:LAYERS; each layer is a grid of 4 x 4 experts ffn(64), top 4, batches of 32. The delay is exponential, one way.
With --keep, what was found is added to a file as JSON lines, with the loss over time.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from lah_nb import Classifier, DMoE, Swarm, Trainer, Weather, load_mnist

ROWS = ['auto:0:0:1', 'auto:200:0:1', 'auto:200:0.1:1', 'auto:1000:0.1:1', '4:0:0:1', '64:0:0:1', '64:200:0:1', '64:0:0:4']


def curve(history, every: int = 20) -> list[list[float]]:
    "Batches, seconds and the mean loss since the last such point"
    mean = history.groupby((history.step - 1) // every).agg({'step': 'last', 'seconds': 'last', 'loss': 'mean'})
    return [[int(step), round(seconds, 2), round(loss, 4)] for step, seconds, loss in mean.itertuples(index=False)]


def measure(row: str, steps: int | None, seed: int, data) -> dict:
    in_flight, delay, drop, layers = row.split(':')
    delay, drop, layers = float(delay), float(drop), int(layers)
    if in_flight != 'auto': in_flight = int(in_flight)
    steps = steps or (2000 if layers == 1 else 1500)
    torch.manual_seed(seed)
    prefixes = [f'ffn.{i}' for i in range(layers)]
    with Swarm.local(peers=4, experts=f'ffn.[0:{layers}].[0:4].[0:4]', hidden_dim=64) as swarm, \
         Weather(delay=delay / 1000, drop=drop, seed=seed).over(swarm):
        moe = [DMoE(swarm, 64, grid=(4, 4), k=4, uid_prefix=prefix) for prefix in prefixes]
        model = Classifier(moe, data.features, 64, data.classes)
        trainer = Trainer(model, batch_size=32, in_flight=in_flight, seed=seed, progress=False)
        history = trainer.fit(data, steps=steps)
        start = time.monotonic()
        accuracy = trainer.evaluate(data)['accuracy']
        return dict(
            row=row, seed=seed, steps=steps, accuracy=round(accuracy, 4),
            samples_per_s=round(trainer.samples / trainer.seconds), in_flight=round(float(history.in_flight.mean()), 1),
            staleness=round(float(history.staleness.mean()), 1), expert_staleness=round(float(history.expert_staleness.mean()), 1),
            failed_calls=int(history.failed_calls.iloc[-1]), test_seconds=round(time.monotonic() - start, 1), curve=curve(history))


parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parse.add_argument('--rows', nargs='+', default=ROWS, metavar='ROW')
parse.add_argument('--steps', type=int)
parse.add_argument('--seeds', type=int, default=1)
parse.add_argument('--json', action='store_true')
parse.add_argument('--keep', type=Path, metavar='FILE')
args = parse.parse_args()

torch.set_num_threads(1)
data = load_mnist(progress=False)
for row in args.rows:
    for seed in range(args.seeds):
        found = measure(row, args.steps, seed, data)
        if args.keep:
            with args.keep.open('a') as file: print(json.dumps(found), file=file)
        del found['curve']
        told = ', '.join(f'{name} {value}' for name, value in found.items())
        print(json.dumps(found) if args.json else told, flush=True)
