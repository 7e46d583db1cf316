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

from lah_nb import Swarm
from lah_nb.training.recipes import RECIPES
from lah_nb.training.trainer import Trainer
from lah_nb.mixture import DMoE


def start(swarm: Swarm, folder: Path, name: str, args, seconds: float, seed: int, share: bool) -> subprocess.Popen:
    command = [sys.executable, '-c', 'from lah_nb.command.cli import main; main()', 'train', 'mnist', '--join', swarm.addrs[0]]
    command += ['--seconds', str(seconds), '--steps', '1000000', '--seed', str(seed), '--delay', str(args.delay), '--drop', str(args.drop)]
    command += ['--save', str(folder / name), '--report', str(folder / f'{name}.html'), '--json']
    if share: command += ['--share', 'benchmark']
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def outcome(process: subprocess.Popen, file: Path, swarm: Swarm) -> dict:
    out, _ = process.communicate(timeout=300)
    if process.returncode: raise SystemExit(f'a trainer failed: {out[-2000:]}')
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
        folder = Path(tmp)
        if not share: return [outcome(start(swarm, folder, 'alone', args, args.seconds, 0, False), folder / 'alone', swarm)]
        there = [start(swarm, folder, str(i), args, args.seconds, i, True) for i in range(3)]
        time.sleep(args.seconds / 2)
        there[0].kill()
        late = start(swarm, folder, '3', args, args.seconds / 2, 3, True)
        found = [outcome(process, folder / str(i + 1), swarm) for i, process in enumerate([*there[1:], late])]
        there[0].wait()
        return found


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--seconds', type=float, default=120.)
    parse.add_argument('--delay', type=float, default=200.)
    parse.add_argument('--drop', type=float, default=0.1)
    parse.add_argument('--json', action='store_true')
    args = parse.parse_args()
    found = [{'trainers': who, **one} for who, share in (('alone', False), ('shared', True)) for one in run(args, share)]
    print(json.dumps(found) if args.json else pd.DataFrame(found).to_string(index=False))


if __name__ == '__main__': main()
