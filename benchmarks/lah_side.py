"""Our half of vs_hivemind.py: the same job, line by line. Prints one line of JSON: {"batch": [seconds of each step]}."""
import json
import sys
import time

import torch

from lah_nb import DMoE, Swarm

torch.set_num_threads(1)


def train(peers: int, grid: list[int], hidden_dim: int, k: int, lr: float, batches: dict[str, int]):
    uids = 'ffn.' + '.'.join(f'[0:{n}]' for n in grid)
    with Swarm.local(peers=peers, experts=uids, expert_cls='ffn', hidden_dim=hidden_dim, optimizer='sgd', lr=lr) as swarm:
        layer = DMoE(swarm, in_dim=hidden_dim, grid=grid, uid_prefix='ffn', k=k)

        def step(batch: int) -> float:
            x, grad = torch.randn(batch, hidden_dim, requires_grad=True), torch.randn(batch, hidden_dim) / batch
            start = time.perf_counter()
            layer(x).backward(grad)
            return time.perf_counter() - start

        torch.manual_seed(0)
        for batch in map(int, batches): step(batch)
        times = {batch: [step(int(batch)) for _ in range(steps)] for batch, steps in batches.items()}
        if failed := layer.stats.snapshot()['failed_calls']: raise SystemExit(f'{failed} calls failed')
        return times


if __name__ == '__main__': print(json.dumps(train(**json.loads(sys.argv[1]))), flush=True)
