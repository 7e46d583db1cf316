"""Four trainers that share a trunk, one of which is killed half-way and one late, against a single one on the same swarm, for equal time.

    LAH_DATA=../shared/data python benchmarks/sharing.py [--seconds 120] [--delay 200] [--drop 0.1] [--json]

MNIST, four local peers, the recipe's settings; the swarm is new for each of the two. `pause_s` is the longest time between two batches of a trainer
that was there all along.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from lah_nb import DMoE, LahError, Swarm
from lah_nb.training.recipes import RECIPES

TESTED_WITHIN = 180  # seconds that a trainer may take beside its training, its test included


def start(swarm: Swarm, folder: Path, name: str, args, seconds: float, seed: int, share: bool) -> subprocess.Popen:
    command = [sys.executable, '-c', 'from lah_nb.command.cli import main; main()', 'train', 'mnist', '--join', swarm.addrs[0]]
    command += ['--seconds', str(seconds), '--steps', '1000000', '--seed', str(seed), '--delay', str(args.delay), '--drop', str(args.drop)]
    command += ['--save', str(folder / name), '--report', str(folder / f'{name}.html'), '--json']
    if share: command += ['--share', 'benchmark']
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def outcome(process: subprocess.Popen, file: Path, swarm: Swarm, seconds: float) -> dict:
    out, _ = process.communicate(timeout=seconds + TESTED_WITHIN)
    if process.returncode: raise LahError(f'a trainer failed: {out[-2000:]}')
    told = json.loads(out.splitlines()[-1])
    recipe = RECIPES['mnist']
    data = recipe.load()
    trainer = recipe.trainer(recipe.model([DMoE(swarm, recipe.hidden_dim, grid=recipe.grid, k=recipe.k)], data), progress=False)
    trainer.load(file)
    return {name: told[name] for name in ('steps', 'test_loss', 'test_accuracy', 'failed_calls')} | {
        'pause_s': round(float(trainer.history.seconds.diff().max()), 2)}


def run(args, share: bool) -> list[dict]:
    recipe = RECIPES['mnist']
    with tempfile.TemporaryDirectory() as tmp, Swarm.local(4, recipe.experts, hidden_dim=recipe.hidden_dim, lr=recipe.expert_lr) as swarm:
        folder, trainers = Path(tmp), {}
        def begin(name, seconds): trainers[name] = start(swarm, folder, name, args, seconds, len(trainers), share)
        try:
            for name in ('first', 'second', 'third') if share else ('alone',): begin(name, args.seconds)
            if share:
                time.sleep(args.seconds / 2)
                trainers['first'].kill()
                begin('late', args.seconds / 2)
            ends = [name for name in trainers if name != 'first']
            return [{'trainer': name, **outcome(trainers[name], folder / name, swarm, args.seconds)} for name in ends]
        finally:
            for process in trainers.values():
                process.kill()
                process.wait()


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--seconds', type=float, default=120.)
    parse.add_argument('--delay', type=float, default=200.)
    parse.add_argument('--drop', type=float, default=0.1)
    parse.add_argument('--json', action='store_true')
    args = parse.parse_args()
    found = run(args, share=False) + run(args, share=True)
    print(json.dumps(found) if args.json else pd.DataFrame(found).to_string(index=False))


if __name__ == '__main__': main()
