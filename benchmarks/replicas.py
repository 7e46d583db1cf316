"""Do the hosts of one expert stay together? Two processes host the same experts, and each is taught by a caller of its own.

    LAH_DATA=... python benchmarks/replicas.py [--experts 4] [--updates 1000] [--rows 8] [--split] [--seed 0] [--json]

Each expert learns to turn an image of MNIST (64 numbers by a fixed random matrix) into the code of its class. Both hosts are taught
`--updates` times, from images of their own; with `--split` one of them sees only the digits 0 to 4 and the other 5 to 9, as no two callers of a swarm do.
Beside it one host that is taught by both callers. Told are

- `apart`: the largest relative difference of an expert's weights between the two hosts, while they learn (once a second) and at the end;
- `accuracy`: of the test set, by the nearest code, the mean over the experts: at either host, and at the single one;
- `updates`: those that the two hosts say at the end, of those that were made.
"""
import argparse
import json
import os
import threading
import time

import psutil
import torch
import trio

from lah_nb import Swarm, load_mnist
from lah_nb.errors import LahError
from lah_nb.mixture.copies import fetch_packed
from lah_nb.mixture.packed import read_packed
from lah_nb.mixture.replicas import distance

WIDTH = 64


class Task:
    "Images as rows of 64 numbers, and the code of each class"
    def __init__(self, data, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(data.features, WIDTH, generator=generator) / data.features**0.5
        self.codes = torch.randn(data.classes, WIDTH, generator=generator)
        self.train, self.labels = self.rows(data.x_train), data.y_train
        self.test, self.test_labels = self.rows(data.x_test), data.y_test

    def rows(self, images): return images.reshape(len(images), -1).float() @ self.matrix * 2

    def accuracy(self, outputs) -> float:
        return (torch.cdist(outputs, self.codes).argmin(1) == self.test_labels).float().mean().item()


async def call(swarm, peer_id: str, uid: str, x, grad=None):
    "One call for one expert, as a trainer makes it"
    meta = {'uids': [uid], 'counts': [len(x)], 'seed': 0, 'id': b'' if grad is None else os.urandom(16), 'rate': 1.}
    tensors = [x, torch.arange(len(x), dtype=torch.int32)]
    if grad is not None: tensors += [grad, torch.ones(len(x))]
    meta, (answer,) = await swarm.network.call(peer_id, f'call.{"forward" if grad is None else "backward"}', meta, tensors, timeout=10.)
    if not all(meta['ok']): raise LahError(str(meta['why']))
    return answer


async def teach(swarm, plan: list[tuple[str, range]], uid: str, task: Task, updates: int, rows: int, seed: int):
    "Each caller: forward and backward, time and again; none is more than one update ahead, or what the last ones teach would be all that is known in the end"
    mine = [torch.isin(task.labels, torch.tensor(list(digits))).nonzero().flatten() for _, digits in plan]
    generator = torch.Generator().manual_seed(seed)
    async def update(peer_id: str, picked):
        x, want = task.train[picked], task.codes[task.labels[picked]]
        await call(swarm, peer_id, uid, x, (await call(swarm, peer_id, uid, x) - want) / rows)
    for _ in range(updates):
        async with trio.open_nursery() as nursery:
            for (peer, _), images in zip(plan, mine): nursery.start_soon(update, peer, images[torch.randint(len(images), (rows,), generator=generator)])


async def states(swarm, peer_id: str, uids: list[str]) -> dict:
    return {uid: read_packed((await fetch_packed(swarm.network, peer_id, uid))[0])[1] for uid in uids}


async def apart(swarm, peers: list[str], uids: list[str]) -> float:
    first, second = [await states(swarm, peer, uids) for peer in peers]
    return max(distance(first[uid], second[uid]) for uid in uids)


async def quality(swarm, peer_id: str, uids: list[str], task: Task) -> float:
    found = []
    for uid in uids:
        parts = [await call(swarm, peer_id, uid, piece) for piece in task.test.split(1000)]
        found.append(task.accuracy(torch.cat(parts)))
    return sum(found) / len(found)


def learn(swarm, plan: list[tuple[str, range]], uids: list[str], task: Task, updates: int, rows: int, seed: int, between) -> float:
    "Teach each peer its digits; gives the seconds; meanwhile `between` is called once a second"
    async def all_of_it():
        async with trio.open_nursery() as nursery:
            for at, uid in enumerate(uids): nursery.start_soon(teach, swarm, plan, uid, task, updates, rows, seed + at)
    failed = []
    def run():
        try: swarm.portal.run(all_of_it, timeout=3600.)
        except Exception as error: failed.append(error)
    start, worker = time.monotonic(), threading.Thread(target=run)
    worker.start()
    while worker.is_alive():
        worker.join(1.)
        between()
    if failed: raise failed[0]
    return time.monotonic() - start


def run(experts: int, updates: int, rows: int, split: bool, seed: int, data) -> dict:
    task, pattern = Task(data, seed), f'ffn.[0:{experts}]'
    uids, digits = [f'ffn.{i}' for i in range(experts)], [range(5), range(5, 10)] if split else [range(10)] * 2
    with Swarm.local(peers=1, experts=pattern, hidden_dim=WIDTH, copies=0) as swarm:
        alone = swarm.local_peers[0].peer_id
        learn(swarm, [(alone, its) for its in digits], uids, task, updates, rows, seed, lambda: None)
        single = swarm.portal.run(quality, swarm, alone, uids, task)
    with Swarm.local(peers=1, experts=pattern, hidden_dim=WIDTH, copies=0) as swarm:
        swarm.start_peers(1, pattern, hidden_dim=WIDTH, copies=0)
        peers, while_learning = [peer.peer_id for peer in swarm.local_peers], []
        seconds = learn(swarm, list(zip(peers, digits)), uids, task, updates, rows, seed, lambda: while_learning.append(swarm.portal.run(apart, swarm, peers, uids)))
        time.sleep(15)  # a meeting after the last update
        at_the_end = swarm.portal.run(apart, swarm, peers, uids)
        told = [int(state['updates']) for peer in peers for state in swarm.portal.run(states, swarm, peer, uids).values()]
        found = [swarm.portal.run(quality, swarm, peer, uids, task) for peer in peers]
    return dict(seed=seed, split=split, experts=experts, updates_each=updates, rows=rows, seconds=round(seconds, 1), apart_median=round(sorted(while_learning)[len(while_learning) // 2], 4),
                apart_most=round(max(while_learning), 4), apart_at_the_end=float(f'{at_the_end:.2g}'), updates_told=[min(told), max(told)], updates_made=2 * updates,
                accuracy=[round(each, 4) for each in found], accuracy_of_one=round(single, 4), cores=psutil.cpu_count())


parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parse.add_argument('--experts', type=int, default=4)
parse.add_argument('--updates', type=int, default=1000)
parse.add_argument('--rows', type=int, default=8)
parse.add_argument('--split', action='store_true')
parse.add_argument('--seed', type=int, default=0)
parse.add_argument('--json', action='store_true')
args = parse.parse_args()

torch.set_num_threads(1)
found = run(args.experts, args.updates, args.rows, args.split, args.seed, load_mnist(progress=False))
print(json.dumps(found) if args.json else ', '.join(f'{name} {value}' for name, value in found.items()), flush=True)
