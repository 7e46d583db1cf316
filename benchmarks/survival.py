"""What a swarm loses with its hosts: MNIST on 16 peers with 64 experts, a calm run and one in which peers are lost, one after the other.

    LAH_DATA=... python benchmarks/survival.py [--cases calm killed leaving stopped] [--peers 16] [--lost 5] [--steps 2000] [--seed 0] [--json]

`killed`: some peers get SIGKILL at once, in the middle. `leaving`: they leave in order, one after another. `stopped`: one of them sleeps for ten seconds
(SIGSTOP). Told are the final accuracy, how long it took until every expert had a host again, and of the fifteen seconds from the loss on: the longest time
without a step, and the stall, which is how many seconds those steps are worth that were not made, at the rate of the fifteen seconds before. The calm run
tells the same of its middle: so much is noise.
"""
import argparse
import json
import os
import random
import signal
import threading
import time

import torch

from lah_nb import Classifier, DMoE, Swarm, Trainer, load_mnist

CASES = 'calm', 'killed', 'leaving', 'stopped'
WINDOW = 15.  # seconds before and after the loss that are compared


def lose(case: str, swarm, victims: list, found: dict):
    "Lose peers, and wait until every expert has a host again"
    before, start = swarm.snapshot(timeout=5.), time.monotonic()
    if case == 'killed':
        for peer in victims: peer.kill()
    elif case == 'leaving':
        for peer in victims: peer.stop()
    else:
        os.kill(victims[0].pid, signal.SIGSTOP)
        time.sleep(10)
        os.kill(victims[0].pid, signal.SIGCONT)
    ends = time.monotonic()
    while (after := swarm.snapshot(timeout=5.)).experts < before.experts and time.monotonic() - ends < 120: time.sleep(1)
    found.update(served_again_s=round(time.monotonic() - start, 1), experts_after=after.experts)


def stall(moments: list[float], at: float) -> dict[str, float]:
    "What the steps at `moments` say of the seconds from `at` on, beside those before"
    first, last = max(at - WINDOW, moments[0]), min(at + WINDOW, moments[-1])
    before, after = (sum(a < moment <= b for moment in moments) for a, b in ((first, at), (at, last)))
    during = [at, *(moment for moment in moments if at < moment <= last), last]
    gaps = [b - a for a, b in zip(during, during[1:])]
    return dict(longest_gap_s=round(max(gaps), 2), stall_s=round(last - at - after / before * (at - first), 2))


def run(case: str, peers: int, lost: int, steps: int, seed: int, data) -> dict:
    torch.manual_seed(seed)
    with Swarm.local(peers=peers, experts='ffn.[0:8].[0:8]', hidden_dim=64) as swarm:
        model = Classifier([DMoE(swarm, 64, grid=(8, 8), k=4)], data.features, 64, data.classes)
        trainer, found = Trainer(model, batch_size=32, seed=seed, progress=False), {}
        victims = random.Random(seed).sample(list(swarm.peers), lost)
        helper = threading.Thread(target=lose, args=(case, swarm, victims, found), daemon=True)
        def on_step(row):
            if case != 'calm' and row['step'] == steps // 2: helper.start()
        history = trainer.fit(data, steps=steps, on_step=on_step)
        if helper.ident: helper.join()
        return dict(case=case, seed=seed, peers=peers, lost=0 if case == 'calm' else 1 if case == 'stopped' else lost, steps=len(history),
                    accuracy=round(trainer.evaluate(data)['accuracy'], 4), **stall(history.seconds.tolist(), history.seconds.iloc[steps // 2 - 1]),
                    samples_per_s=round(trainer.samples / trainer.seconds), failed_calls=int(history.failed_calls.iloc[-1]), **found)


parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parse.add_argument('--cases', nargs='+', choices=CASES, default=CASES)
parse.add_argument('--peers', type=int, default=16)
parse.add_argument('--lost', type=int, default=5)
parse.add_argument('--steps', type=int, default=2000)
parse.add_argument('--seed', type=int, default=0)
parse.add_argument('--json', action='store_true')
args = parse.parse_args()

torch.set_num_threads(1)
data = load_mnist(progress=False)
for case in args.cases:
    found = run(case, args.peers, args.lost, args.steps, args.seed, data)
    print(json.dumps(found) if args.json else ', '.join(f'{name} {value}' for name, value in found.items()), flush=True)
