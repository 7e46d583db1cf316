"""The limit in run.py: the experts' own arithmetic in two processes, without a network, a gate or autograd. Prints {"batch": [seconds of each step]}."""
import json
import subprocess
import sys
import time

import torch

from lah_nb.mixture import Expert

torch.set_num_threads(1)


def work(side: int, sides: int, grid: list[int], hidden_dim: int, k: int, lr: float, batches: dict[str, int]):
    "One side's half of the experts, for each step told on standard input"
    number = grid[0] * grid[1]
    experts = {i: Expert(f'ffn.{i}', 'ffn', hidden_dim, optimizer='sgd', clip=None) for i in range(side, number, sides)}
    grad = torch.empty_like(experts[side].flat)
    views = [piece.view_as(p) for piece, p in zip(grad.split([p.numel() for p in experts[side].parameters]), experts[side].parameters)]
    generator = torch.Generator().manual_seed(0)  # the same choices on every side
    print('ready', flush=True)
    for line in sys.stdin:
        batch = int(line)
        x, dy = torch.randn(batch, hidden_dim), torch.randn(batch, hidden_dim) / batch
        chosen = torch.rand(batch, number, generator=generator).topk(k).indices
        mine = [(i, (chosen == i).any(1)) for i in chosen.unique().tolist() if i in experts]
        for i, rows in mine:
            with torch.no_grad(): experts[i].module(x[rows])
        for i, rows in mine:
            grad.zero_()
            experts[i].module.backward_into(x[rows], dy[rows], views)
            experts[i].flat.add_(grad, alpha=-lr)
        print('done', flush=True)


def measure(batches: dict[str, int], peers: int, **job):
    sides = [subprocess.Popen([sys.executable, __file__, '--side', json.dumps(dict(job, side=i, sides=2, batches=batches))],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(2)]
    def step(batch: str) -> float:
        start = time.perf_counter()
        for side in sides: print(batch, file=side.stdin, flush=True)
        for side in sides: assert side.stdout.readline() == 'done\n'
        return time.perf_counter() - start
    for side in sides: assert side.stdout.readline() == 'ready\n'
    for batch in batches: step(batch)
    times = {batch: [step(batch) for _ in range(steps)] for batch, steps in batches.items()}
    for side in sides: side.communicate()
    return times


if __name__ == '__main__':
    if sys.argv[1] == '--side': work(**json.loads(sys.argv[2]))
    else: print(json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)
