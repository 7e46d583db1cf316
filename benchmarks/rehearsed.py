"""Is a rehearsal true? The same training through a real swarm on this computer and in virtual time, under the same weather.

    python benchmarks/rehearsed.py [--peers 4 16] [--steps 300] [--seed 0] [--json]

First the costs are measured: CPU seconds of the trainer and of its peers for a batch, in calm weather, one batch in flight. What calls take of
these is measured with pings. Then each row is run in both worlds: samples a second, staleness in steps, seconds of a dispatch forward, and the
ratio of the rehearsal's to the real one's.
"""
import argparse
import json
import statistics
import time

import psutil
import torch

from lah_nb import Classifier, DMoE, Swarm, Trainer, Weather, load_digits
from lah_nb.simulation import Costs, rehearse

GRID, PATTERN = (4, 4), 'ffn.[0:4].[0:4]'
ROWS = [(16, 100, 0.), (16, 200, 0.1), (64, 200, 0.)]  # in flight, mean delay in ms, share of lost calls


def train(swarm, steps: int, in_flight: int, weather: Weather) -> dict:
    torch.manual_seed(0)
    data, took = load_digits(), []
    layer = DMoE(swarm, 64, grid=GRID, k=4)
    trainer = Trainer(Classifier([layer], data.features, 64, data.classes), in_flight=in_flight, progress=False)
    def note(row):
        if layer.stats.last: took.append(layer.stats.last.seconds)
    with weather.over(swarm): history = trainer.fit(data, steps=steps, on_step=note)
    calls = layer.stats.totals()['calls']
    return dict(samples_per_s=trainer.samples / trainer.seconds, staleness=float(history.staleness.iloc[steps // 5:].mean()),
                dispatch_s=statistics.median(took), calls=calls / steps)


def cpu(processes) -> float: return sum(sum(p.cpu_times()[:2]) for p in processes)


def measured_costs(peers: int, steps: int = 150) -> Costs:
    "What a batch takes here, of the trainer and of its peers"
    with Swarm.local(peers, PATTERN, hidden_dim=64) as swarm:
        train(swarm, 20, 1, Weather())
        hosts, here = [psutil.Process(peer.pid) for peer in swarm.peers], [psutil.Process()]
        idle, began = cpu(hosts), time.monotonic()
        time.sleep(3.)
        idle = (cpu(hosts) - idle) / (time.monotonic() - began)
        pings, before = 300, (cpu(hosts), cpu(here))
        for _ in range(pings): swarm.portal.run(swarm.network.ping, swarm.peers[0].peer_id)
        call = min(cpu(hosts) - before[0], cpu(here) - before[1]) / pings
        before, began = (cpu(hosts), cpu(here)), time.monotonic()
        told = train(swarm, steps, 1, Weather())
        theirs = (cpu(hosts) - before[0] - idle * (time.monotonic() - began)) / steps - told['calls'] * call
        ours = (cpu(here) - before[1]) / steps - told['calls'] * call
    each = max(theirs, 0.) / (GRID[0] * GRID[1])  # nearly all experts are in each batch, once in each direction
    return Costs(call=call, forward=(0.3 * each, 0.), backward=(0.7 * each, 0.), trunk=(0.4 * max(ours, 0.), 0.6 * max(ours, 0.)))


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--peers', type=int, nargs='+', default=[4])
    parse.add_argument('--steps', type=int, default=300)
    parse.add_argument('--seed', type=int, default=0)
    parse.add_argument('--json', action='store_true')
    args = parse.parse_args()
    torch.set_num_threads(1)
    for peers in args.peers:
        costs = measured_costs(peers)
        if not args.json: print(f'{peers} peers: {costs}')
        for in_flight, delay, drop in ROWS:
            weather = Weather(delay=delay / 1000, drop=drop, seed=args.seed)
            with Swarm.local(peers, PATTERN, hidden_dim=64) as swarm: real = train(swarm, args.steps, in_flight, weather)
            made = rehearse(lambda swarm: train(swarm, args.steps, in_flight, weather), peers=peers, experts=PATTERN, costs=costs,
                            cores=psutil.cpu_count(), seed=args.seed)
            row = dict(peers=peers, in_flight=in_flight, delay_ms=delay, drop=drop)
            for name in 'samples_per_s', 'staleness', 'dispatch_s':
                row |= {name: round(real[name], 3), f'{name}_rehearsed': round(made[name], 3)}
                if real[name]: row[f'{name}_ratio'] = round(made[name] / real[name], 3)
            print(json.dumps(row) if args.json else '   '.join(f'{name} {value:g}' for name, value in row.items()), flush=True)


if __name__ == '__main__': main()
