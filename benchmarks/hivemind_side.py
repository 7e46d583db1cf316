"""hivemind's half of vs_hivemind.py. Runs in hivemind's own environment, prints one line of JSON: {"batch": [seconds of each step]}."""
import json
import subprocess
import sys
import time
from functools import partial

import torch
from torch import nn

torch.set_num_threads(1)


class PaperBlock(nn.Module):
    "The block that `lah_nb` calls `ffn`: h -> 4h -> 4h -> h; hivemind's own `ffn` is h -> 4h -> h, a third of the parameters"
    def __init__(self, h: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(h, 4*h), nn.LayerNorm(4*h), nn.ReLU(), nn.Linear(4*h, 4*h), nn.LayerNorm(4*h), nn.ReLU(), nn.Linear(4*h, h))
    def forward(self, x): return x + self.layers(x)


def serve(uids: list[str], block: str, hidden_dim: int, lr: float, handlers: int, initial_peers: list[str]):
    from hivemind.moe.server import Server, register_expert_class
    register_expert_class('paper', lambda batch, h: torch.empty(batch, h))(PaperBlock)
    server = Server.create(expert_uids=uids, expert_cls=block, hidden_dim=hidden_dim, optim_cls=partial(torch.optim.SGD, lr=lr), num_handlers=handlers,
                           device='cpu', initial_peers=initial_peers, start=True)
    print('ready', *map(str, server.dht.get_visible_maddrs()), flush=True)
    sys.stdin.read()  # until the trainer is gone
    server.shutdown()


def train(peers: int, grid: list[int], hidden_dim: int, k: int, lr: float, batches: dict[str, int], block: str = 'paper', handlers: int = 4):
    import hivemind
    from hivemind.moe import RemoteMixtureOfExperts
    uids = [f'ffn.{i}.{j}' for i in range(grid[0]) for j in range(grid[1])]
    servers, addrs = [], []
    for i in range(peers):
        args = json.dumps(dict(uids=uids[i::peers], block=block, hidden_dim=hidden_dim, lr=lr, handlers=handlers, initial_peers=addrs))
        servers.append(subprocess.Popen([sys.executable, __file__, '--serve', args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        line = next((line for line in servers[-1].stdout if line.startswith('ready')), None)
        if not line: raise SystemExit('a hivemind server did not start')
        addrs = addrs or line.split()[1:]
    dht = hivemind.DHT(initial_peers=addrs, start=True)
    layer = RemoteMixtureOfExperts(in_features=hidden_dim, grid_size=tuple(grid), dht=dht, uid_prefix='ffn.', k_best=k)

    def step(batch: int) -> float:
        x, grad = torch.randn(batch, hidden_dim, requires_grad=True), torch.randn(batch, hidden_dim) / batch
        start = time.perf_counter()
        layer(x).backward(grad)
        return time.perf_counter() - start

    torch.manual_seed(0)
    for batch in map(int, batches): step(batch)
    return {batch: [step(int(batch)) for _ in range(steps)] for batch, steps in batches.items()}


if __name__ == '__main__':
    if sys.argv[1] == '--serve': serve(**json.loads(sys.argv[2]))
    else: print(json.dumps(train(**json.loads(sys.argv[1]))), flush=True)
