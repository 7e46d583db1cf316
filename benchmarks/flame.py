"""Where a step's time goes: stacks of the trainer and of one of its four servers, sampled by py-spy while a DMoE layer steps.

    pip install py-spy
    python benchmarks/flame.py [--batch 32] [--seconds 20] [--keep nbs/experiments/flame.json]

The job is that of `run.py`: 16 x 16 `ffn(64)`, k = 4, four servers, SGD, one batch at a time. py-spy reads the stacks of other processes, for which
it may have to run as root. Samples in which a thread only waits are left out, and so is what has less than a two-hundredth of the rest.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch

from lah_nb import DMoE, Swarm

WAITS = {'get_events', 'wait', 'work', '_work', 'wait_for_read', '_read_lines'}  # functions in which a thread does nothing
ABOVE = {'<module>', 'main', '_peer', 'serve', 'run', 'unrolled_run', '_bootstrap', '_bootstrap_inner', 'sample'}  # what all stacks of a thread begin with
LEAST = 1 / 200
MORE = 60  # seconds that py-spy may take beside those for which it looks


def stacks(raw: Path) -> tuple[int, Counter]:
    "Samples in all, and those of each stack, as functions and their files"
    found = Counter()
    for line in raw.read_text().splitlines():
        path, _, samples = line.rpartition(' ')
        frames = [re.sub(r':\d+\)$', ')', frame) for frame in path.split(';')]
        names = [frame.split(' ')[0].rpartition('.')[2] for frame in frames]
        if names[-1] in WAITS: continue
        while len(frames) > 1 and (names[0] in ABOVE or frames[0].startswith('thread ')): del frames[0], names[0]
        found[tuple(frame.replace('lah_nb/', '') for frame in frames)] += int(samples)
    return sum(found.values()), found


def tree(raw: Path) -> dict:
    "Samples by the beginnings of stacks, the rare ones left out"
    total, found = stacks(raw)
    parts = Counter()
    for frames, samples in found.items():
        for depth in range(1, len(frames) + 1): parts[frames[:depth]] += samples
    return {'samples': total, 'parts': [[list(frames), n] for frames, n in sorted(parts.items()) if n >= LEAST * total]}


def sample(batch: int, seconds: float, folder: Path) -> dict:
    torch.set_num_threads(1)
    with Swarm.local(4, 'ffn.[0:16].[0:16]', hidden_dim=64, optimizer='sgd', lr=0.01, copies=0) as swarm:
        layer, steps = DMoE(swarm, 64, grid=(16, 16), k=4), 0
        def step(): layer(torch.randn(batch, 64, requires_grad=True)).backward(torch.randn(batch, 64) / batch)
        for _ in range(20): step()
        watched, spies = {'server': swarm.peers[0].pid, 'trainer': os.getpid()}, []
        for name, pid in watched.items():
            command = ['py-spy', 'record', '--format', 'raw', '--rate', '200', '--threads', '--duration', str(seconds), '--pid', str(pid), '--output', folder / name]
            spies.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        end = time.monotonic() + seconds + MORE
        try:
            while any(spy.poll() is None for spy in spies) and time.monotonic() < end:
                step()
                steps += 1
        finally:
            for spy in spies: spy.kill()
        for spy in spies:
            spy.wait()
            if spy.returncode: raise SystemExit(f'py-spy could not look: {spy.stderr.read()[-500:]}')
        return {'date': str(date.today()), 'torch': torch.__version__, 'batch': batch, 'steps': steps, **{name: tree(folder / name) for name in watched}}


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--batch', type=int, default=32)
    parse.add_argument('--seconds', type=int, default=20)
    parse.add_argument('--keep', type=Path, metavar='FILE')
    args = parse.parse_args()
    if not shutil.which('py-spy'): raise SystemExit('this needs py-spy: pip install py-spy')
    with tempfile.TemporaryDirectory() as tmp: found = sample(args.batch, args.seconds, Path(tmp))
    if args.keep: args.keep.write_text(json.dumps(found))
    for name in 'server', 'trainer':
        print(f'{name}: {found[name]["samples"]} samples at work')
        for frames, n in found[name]['parts']:
            if n >= found[name]['samples'] / 20: print(f'{100 * n / found[name]["samples"]:5.1f} %  {"  " * len(frames)}{frames[-1]}')


if __name__ == '__main__': main()
