"""How much memory a server takes: one process with 64 ffn(64) experts that has served forward and backward of all of them.

    python benchmarks/server_memory.py [--optimizer adam] [--json]
"""
import argparse
import json

import psutil
import torch

from lah_nb import DMoE, Swarm

parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parse.add_argument('--optimizer', default='adam')
parse.add_argument('--steps', type=int, default=30)
parse.add_argument('--json', action='store_true')
args = parse.parse_args()

torch.set_num_threads(1)
with Swarm.local(peers=1, experts='ffn.[0:8].[0:8]', expert_cls='ffn', hidden_dim=64, optimizer=args.optimizer) as swarm:
    server = psutil.Process(swarm.local_peers[0].pid)
    mib = lambda: sum(p.memory_info().rss for p in [server, *server.children(recursive=True)]) / 2**20
    started = mib()
    layer = DMoE(swarm, in_dim=64, grid=(8, 8), k=4)
    for _ in range(args.steps): layer(torch.randn(64, 64, requires_grad=True)).square().mean().backward()
    found = dict(experts=len(layer.stats.snapshot()['served']), processes=1 + len(server.children(recursive=True)), mib_started=round(started), mib_after=round(mib()))
print(json.dumps(found) if args.json else f'{found["experts"]} experts served by {found["processes"]} process: {found["mib_started"]} MiB when ready, {found["mib_after"]} MiB after {args.steps} steps')
