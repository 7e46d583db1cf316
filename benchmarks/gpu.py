"""Throughput on a GPU, as in the paper's section 4.1 but forward and backward: layers of remote experts beside the same blocks as one local model.

    python benchmarks/gpu.py [--block ffn|transformer] [--delays 0 50 100 200] [--in-flight 16] [--json]
    python benchmarks/gpu.py --device cpu --width 64 --rows 32 --seconds 3     # to see that it works

Each of `--layers` layers has a grid of experts, spread over `--peers` processes that share the device; a row goes to 4 experts of each. The local
model has, for each layer, 4 blocks one after another: as much arithmetic for a row. Experts take a step of SGD in each backward pass, and so does
the local model. Block ffn: width -> 4 width -> 4 width -> width with LayerNorm, 2,048 rows a batch; transformer: 4 sequences of 512. The delay is
exponential, one way. Figures are samples (ffn: rows; transformer: sequences) a second.
"""
import argparse
import itertools
import json
import time
from contextlib import closing

import torch
from torch import nn

from lah_nb import DMoE, Swarm, Weather
from lah_nb.mixture.classes import EXPERTS
from lah_nb.training import in_flight

K, ROWS, LENGTH = 4, {'ffn': 2048, 'transformer': 4}, 512


def throughput(step, rows: int, seconds: float, flying: int) -> float:
    "Samples a second of `step()`, several at a time, after one that does not count"
    step()
    began, jobs, done = time.monotonic(), itertools.count(), 0
    def take(): return next(jobs) if time.monotonic() < began + seconds else None
    with closing(in_flight(lambda job, slot: step(), take, flying, drain=60.)) as results:
        for _, _, error in results:
            if error is not None: raise error
            done += 1
    return done * rows / (time.monotonic() - began)


def both_ways(model: nn.Module, x: torch.Tensor, after=lambda: None):
    "A forward pass alone, and one with backward"
    def forward():
        with torch.no_grad(): model(x).sum().item()
    def backward():
        y = model(x.clone().requires_grad_())
        y.backward(torch.ones_like(y) / y.numel())
        after()
    return dict(forward=forward, backward=backward)


def local(args, x: torch.Tensor) -> dict:
    model = nn.Sequential(*(EXPERTS[args.block].build(args.width) for _ in range(args.layers * K))).to(args.device)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
    def step():
        sgd.step()
        sgd.zero_grad()
    return {name: throughput(step, len(x), args.seconds, 1) for name, step in both_ways(model, x.to(args.device), step).items()}


def remote(args, x: torch.Tensor, delay: float) -> dict:
    grid, prefixes = (4, 4), [f'{args.block}.{i}' for i in range(args.layers)]
    pattern = f'{args.block}.[0:{args.layers}].[0:4].[0:4]'
    with Swarm.local(args.peers, pattern, expert_cls=args.block, hidden_dim=args.width, optimizer='sgd', lr=1e-4, device=args.device, copies=0) as swarm:
        model = nn.Sequential(*(DMoE(swarm, args.width, grid=grid, k=K, uid_prefix=prefix, route='row') for prefix in prefixes))
        with Weather(delay=delay / 1000).over(swarm):
            return {name: throughput(step, len(x), args.seconds, args.in_flight) for name, step in both_ways(model, x).items()}


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--block', choices=list(ROWS), default='ffn')
    parse.add_argument('--delays', type=float, nargs='+', default=[0., 50., 100., 200.], metavar='MS')
    parse.add_argument('--width', type=int, default=1024)
    parse.add_argument('--rows', type=int, help='samples in a batch')
    parse.add_argument('--layers', type=int, default=4)
    parse.add_argument('--peers', type=int, default=4)
    parse.add_argument('--in-flight', type=int, default=16)
    parse.add_argument('--seconds', type=float, default=20., help='for which each is measured')
    parse.add_argument('--device', default='cuda')
    parse.add_argument('--json', action='store_true')
    args = parse.parse_args()
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise SystemExit('no CUDA device is found here; with --device cpu --width 64 --rows 32 you see that it works')
    rows = args.rows or ROWS[args.block]
    x = torch.randn(rows, args.width) if args.block == 'ffn' else torch.randn(rows, LENGTH, args.width)
    device = torch.cuda.get_device_name() if args.device.startswith('cuda') else args.device
    alone = local(args, x)
    told = [dict(where='local', **alone)]
    for delay in args.delays:
        found = remote(args, x, delay)
        told.append(dict(where='swarm', delay_ms=delay, **found, **{f'{name}_of_local': found[name] / alone[name] for name in found}))
    about = dict(block=args.block, width=args.width, rows=rows, layers=args.layers, device=device, torch=torch.__version__)
    for row in told:
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in (row | about).items()}
        print(json.dumps(row) if args.json else '   '.join(f'{name} {value}' for name, value in row.items()), flush=True)


if __name__ == '__main__': main()
