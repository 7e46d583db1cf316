"""What hostile hosts cost: MNIST (or digits) on a local swarm in which some peers turn round or scale the input gradients that they return.

    LAH_DATA=... python benchmarks/hostile.py [--cases honest flipped scaled] [--screens on off] [--peers 10] [--hostile 2] [--steps 1000] [--data digits] [--seed 0] [--json]

Two DMoE layers, so that there is a layer below that wrong gradients mislead. The hostile peers are processes of this file, nothing in the library lies.
Told are the final accuracy, the hostile peers that the trainer left, the honest ones that it left (none), and how many of the rows were asked for again.
"""
import argparse
import json
import subprocess
import sys
import threading

import torch

from lah_nb import Classifier, DMoE, Swarm, Trainer, load_digits, load_mnist

SCALE = 100.
LIES = {'flipped': lambda right: -right, 'scaled': lambda right: SCALE * right}


def be_hostile(case: str, options: list[str]):
    "An ordinary peer, but for what it answers to a backward"
    from lah_nb.command.cli import main
    from lah_nb.mixture.server import Server
    honest = Server._backward
    async def backward(self, request):
        meta, (right,) = await honest(self, request)
        return meta, [LIES[case](right)]
    Server._backward = backward
    sys.exit(main(['peer', *options]))


def start_hostile(case: str, addr: str, experts: list[str], hidden_dim: int) -> tuple[subprocess.Popen, str]:
    "(process, peer id) of one that lies"
    command = [sys.executable, __file__, '--be', case, '--join', addr, '--experts', ','.join(experts), '--hidden-dim', str(hidden_dim), '--copies', '0']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    late = threading.Timer(60., process.kill)
    late.start()
    ready = process.stdout.readline().split()
    late.cancel()
    if ready[:1] != ['ready']:
        process.kill()
        process.wait(5)
        raise RuntimeError(f'a hostile peer did not start within a minute: {ready}')
    return process, ready[1].rpartition('/')[2]


def run(case: str, screens: str, args, data) -> dict:
    torch.manual_seed(args.seed)
    number = 0 if case == 'honest' else args.hostile
    uids = [f'{layer}.{i}.{j}' for layer in ('low', 'high') for i in range(4) for j in range(5)]
    parts = [uids[i::args.peers] for i in range(args.peers)]  # all peers host as much of each layer
    liars = []
    with Swarm.local(peers=1, experts=','.join(parts[0]), hidden_dim=32, copies=0) as swarm:
        try:
            for part in parts[1:args.peers - number]: swarm.start_peers(1, ','.join(part), hidden_dim=32, copies=0)
            for part in parts[args.peers - number:]: liars.append(start_hostile(case, swarm.addrs[0], part, 32))
            audits = swarm.roster.audits
            if screens == 'off': swarm.roster.audits = None
            layers = [DMoE(swarm, 32, grid=(4, 5), uid_prefix=prefix, k=4) for prefix in ('low', 'high')]
            trainer = Trainer(Classifier(layers, data.features, 32, data.classes), batch_size=32, seed=args.seed, progress=False)
            trainer.fit(data, steps=args.steps)
            accuracy, left = trainer.evaluate(data)['accuracy'], set(swarm.roster.left)
        finally:
            for process, _ in liars: process.kill()
            for process, _ in liars: process.wait(5)
    hostile = {peer for _, peer in liars}
    return dict(case=case, screens=screens, seed=args.seed, peers=args.peers, hostile=number, steps=args.steps, accuracy=round(accuracy, 4),
                left_hostile=len(left & hostile), left_honest=len(left - hostile), rows_again=round(audits.rows_again / max(audits.rows, 1), 4),
                fetched_mib=round(audits.fetched / 2**20, 1))


if sys.argv[1:2] == ['--be']: be_hostile(sys.argv[2], sys.argv[3:])

parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parse.add_argument('--cases', nargs='+', choices=('honest', *LIES), default=('honest', *LIES))
parse.add_argument('--screens', nargs='+', choices=('on', 'off'), default=('on', 'off'))
parse.add_argument('--peers', type=int, default=10)
parse.add_argument('--hostile', type=int, default=2)
parse.add_argument('--steps', type=int, default=1000)
parse.add_argument('--data', choices=('mnist', 'digits'), default='mnist')
parse.add_argument('--seed', type=int, default=0)
parse.add_argument('--json', action='store_true')
args = parse.parse_args()

torch.set_num_threads(1)
data = load_digits() if args.data == 'digits' else load_mnist(progress=False)
for case in args.cases:
    for screens in args.screens if case != 'honest' else ('on',):
        found = run(case, screens, args, data)
        print(json.dumps(found) if args.json else ', '.join(f'{name} {value}' for name, value in found.items()), flush=True)
