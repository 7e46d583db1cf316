"""What churn costs: peers die (SIGKILL) and new ones come, so that half of them are gone after a while, and their experts live on.

    LAH_DATA=... python benchmarks/churn.py [--peers 12] [--half-life 60] [--seconds 600] [--calm 60] [--absent 5] [--spare 0] [--seed 0] [--json]

One trainer all the while, on MNIST: first without churn for `--calm` seconds, then with it for `--seconds`. Each peer dies after a time drawn from an
exponential with that half-life; `--absent` seconds later a new one starts, with a new identity, and takes experts that nobody hosts, or that were only adopted. Told are

- the samples a second, calm and with churn, and `kept`: what each living peer gave with churn, of what each gave when calm;
- `served`: experts that had a host, on average, and at the end (a minute later, without further deaths, at most);
- `lost_updates`: the most updates by which an expert of a dead peer came back older than it was last seen, and `within_lag`: whether that is within the lag
  that copies are allowed (100 updates, or what an expert learnt in 30 s, and the second between two looks);
- `accounted`: whether every batch was trained once or is still to be handed out, and none twice;
- `soak`: threads, handles (files, sockets) and MiB of the trainer, of the bootstrap peer and, with `--spare 1`, of a host that does not die, each in the second fifth of the time
  and in the last.
"""
import argparse
import json
import math
import os
import random
import statistics
import threading
import time

import psutil
import torch

from lah_nb import Classifier, DMoE, Swarm, Trainer, load_mnist
from lah_nb.errors import LahError
from lah_nb.simulation.training_run import Losses
from lah_nb.swarm.children import LocalPeer

EXPERTS, PATTERN = 64, 'ffn.[0:8].[0:8]'


class Churn(threading.Thread):
    "Kills peers of a swarm, and starts others"
    def __init__(self, swarm, half_life: float, absent: float, spare: int, seed: int):
        super().__init__(name='churn', daemon=True)
        self.swarm, self.rng, self.half_life, self.absent = swarm, random.Random(seed), half_life, absent
        self.each = EXPERTS // len(swarm.local_peers)
        self.over, self.killed, self.failed = threading.Event(), 0, []
        self.deaths = {peer: self._death() for peer in swarm.local_peers[spare:]}  # peer -> when it dies
        self.births, self.starting = [], []  # when new ones come; threads that start one

    def _death(self) -> float: return time.monotonic() + self.rng.expovariate(math.log(2) / self.half_life)

    def run(self):
        while not self.over.wait(0.2):
            now = time.monotonic()
            for peer, at in list(self.deaths.items()):
                if at > now or len(self.deaths) <= 2: continue  # somebody has to be there to come back to
                del self.deaths[peer]
                peer.kill()
                self.killed += 1
                self.births.append(now + self.absent)
            due = [at for at in self.births if at <= now]
            self.births = [at for at in self.births if at > now]
            for _ in due:
                self.starting.append(thread := threading.Thread(target=self._start, daemon=True))
                thread.start()
        for thread in self.starting: thread.join(90.)

    def _start(self):
        try: peer, = self.swarm.start_peers(1, PATTERN, num_experts=self.each, timeout=80.)
        except LahError as error: return self.failed.append(str(error)[:200])
        self.deaths[peer] = self._death()


class Watch(threading.Thread):
    "Looks once a second at what lives, and at what each expert has learnt"
    def __init__(self, swarm, trainer, processes: dict[str, int]):
        super().__init__(name='watch', daemon=True)
        self.swarm, self.trainer, self.over = swarm, trainer, threading.Event()
        self.rows = []  # (when, samples so far, peers alive, experts served)
        self.losses = Losses()
        self.processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self.used = []  # of each process (threads, handles, MiB), by its name

    def run(self):
        while not self.over.wait(1.): self.look()

    def look(self):
        try: told = self.swarm.portal.run(self._ask)
        except LahError: return
        now, alive = time.monotonic(), sum(peer.alive and peer.peer_id is not None for peer in list(self.swarm.local_peers))
        self.rows.append((now, self.trainer.samples, alive, len(told)))
        self.losses.note(now, told)
        self.used.append({name: (p.num_threads(), p.num_fds(), p.memory_info().rss / 2**20) for name, p in self.processes.items()})

    async def _ask(self) -> dict[str, int]:
        "The updates of each expert, at the host that has most"
        statuses, _ = await self.swarm._status(2.)
        found = {}
        for _, _, meta, _ in statuses:
            for uid, numbers in meta.get('experts', {}).items(): found[uid] = max(numbers[0], found.get(uid, 0))
        return found


def rates(rows: list) -> tuple[float, float]:
    "Samples a second, and for each peer that was alive"
    if len(rows) < 2: return 0., 0.
    seconds, samples = rows[-1][0] - rows[0][0], rows[-1][1] - rows[0][1]
    alive = sum((later[0] - row[0]) * row[2] for row, later in zip(rows, rows[1:])) / seconds
    return samples / seconds, samples / seconds / alive


def soaked(used: list[dict]) -> dict:
    "Early and late means of what each process used"
    fifth = max(1, len(used) // 5)
    def mean(rows, name, place): return round(statistics.mean(row[name][place] for row in rows), 1)
    return {name: {what: [mean(rows, name, place) for rows in (used[fifth:2 * fifth], used[-fifth:])] for place, what in enumerate(('threads', 'handles', 'mib'))}
            for name in used[0]}


def run(peers: int, half_life: float, seconds: float, calm: float, absent: float, spare: int, seed: int, data) -> dict:
    torch.manual_seed(seed)
    bootstrap = LocalPeer('--listen', '/ip4/127.0.0.1/tcp/0')
    try:
        bootstrap.wait_ready()
        return _run(bootstrap, peers, half_life, seconds, calm, absent, spare, seed, data)
    finally: bootstrap.stop()


def _run(bootstrap, peers: int, half_life: float, seconds: float, calm: float, absent: float, spare: int, seed: int, data) -> dict:
    with Swarm.join(bootstrap.addrs) as swarm:
        swarm.start_peers(peers, PATTERN, hidden_dim=64, timeout=30. + 10. * peers)
        model = Classifier([DMoE(swarm, 64, grid=(8, 8), k=4)], data.features, 64, data.classes)
        trainer = Trainer(model, batch_size=32, seed=seed, progress=False)
        watch = Watch(swarm, trainer, {'trainer': os.getpid(), 'bootstrap': bootstrap.pid} | {'host': peer.pid for peer in swarm.local_peers[:spare]})
        watch.start()
        trainer.fit(data, seconds=calm)
        before = len(watch.rows)
        churn = Churn(swarm, half_life, absent, spare, seed)
        churn.start()
        history = trainer.fit(data, seconds=seconds)
        after = len(watch.rows)
        churn.over.set()
        churn.join()
        ends = time.monotonic()
        while watch.rows[-1][3] < EXPERTS and time.monotonic() - ends < 60.: time.sleep(0.5)
        watch.over.set()
        watch.join()
        quiet, stormy = rates(watch.rows[before // 4:before]), rates(watch.rows[before:after])
        trained, left = history.batch.astype(int).tolist(), trainer.ledger.again | trainer.ledger.away
        accounted = sorted([*trained, *left]) == list(range(trainer.ledger.next))
        return dict(seed=seed, peers=peers, half_life_s=half_life, killed=churn.killed, not_started=len(churn.failed),
                    alive=round(statistics.mean(row[2] for row in watch.rows[before:after]), 1),
                    samples_per_s_calm=round(quiet[0]), samples_per_s=round(stormy[0]), of_calm=round(stormy[0] / quiet[0], 2), kept=round(stormy[1] / quiet[1], 2),
                    served=round(statistics.mean(row[3] for row in watch.rows[before:after]), 1), served_at_the_end=watch.rows[-1][3],
                    lost_updates=watch.losses.most, within_lag=watch.losses.beyond <= 0, batches=trainer.step, handed_out_again=len(trainer.failures), accounted=accounted,
                    soak=soaked(watch.used[before:after]), failed_calls=int(history.failed_calls.iloc[-1]), accuracy=round(trainer.evaluate(data)['accuracy'], 4), errors=churn.failed[:3])


parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parse.add_argument('--peers', type=int, default=12)
parse.add_argument('--half-life', type=float, default=60.)
parse.add_argument('--seconds', type=float, default=600.)
parse.add_argument('--calm', type=float, default=60.)
parse.add_argument('--absent', type=float, default=5.)
parse.add_argument('--spare', type=int, default=0, choices=(0, 1), help='peers that do not die')
parse.add_argument('--seed', type=int, default=0)
parse.add_argument('--json', action='store_true')
args = parse.parse_args()

torch.set_num_threads(1)
found = run(args.peers, args.half_life, args.seconds, args.calm, args.absent, args.spare, args.seed, load_mnist(progress=False))
print(json.dumps(found) if args.json else ', '.join(f'{name} {value}' for name, value in found.items()), flush=True)
