"""Is a rehearsal true? The same job on a real swarm on this computer and in virtual time, under the same weather.

    python benchmarks/rehearsed.py [--peers 4 16 32] [--steps 300] [--seed 0] [--json]

First the costs are measured: CPU seconds of the trainer and of its peers for a batch, in calm weather, one batch in flight, and for one of four
times as many rows. What calls take of these is told by peers at rest, who do little else. Then each row is run in both worlds: seconds to look up a
key that was not asked for lately, and for five trainers that have just joined, the median, to choose the best 4 experts of 64 rows (both at a constant 100 ms each way); samples a second, staleness
in steps and seconds of a dispatch forward in the weather that is told; and the ratio of the rehearsal's to the real one's. Run it where nothing
else runs: what takes a core from the real swarm takes none from the rehearsal.
"""
import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
import trio

from lah_nb import Classifier, DMoE, Swarm, Trainer, Weather, load_digits
from lah_nb.machine import cores
from lah_nb.mixture.copies import COPIES
from lah_nb.network.weather import Constant
from lah_nb.simulation import Costs, rehearse
from lah_nb.simulation.world import made_by

GRID, PATTERN, K, ROWS_OF_A_BATCH = (8, 8), 'ffn.[0:8].[0:8]', 4, 32
AT_REST = 20.  # seconds, of which the first are not measured: a new peer warms up
ROWS = [(4, 100, 0.), (8, 200, 0.1), (16, 500, 0.1), (16, 100, 0.), (64, 200, 0.)]  # in flight, mean delay in ms, share of lost calls


def train(swarm, steps: int, in_flight: int, weather: Weather, rows: int = ROWS_OF_A_BATCH) -> dict:
    torch.manual_seed(0)
    data = load_digits()
    layer = DMoE(swarm, 64, grid=GRID, k=K)
    trainer = Trainer(Classifier([layer], data.features, 64, data.classes), batch_size=rows, in_flight=in_flight, progress=False)
    experts = []
    with weather.over(swarm): history = trainer.fit(data, steps=steps, on_step=lambda _: experts.append(layer.stats.last.experts))
    totals = layer.stats.totals()
    return dict(samples_per_s=trainer.samples / trainer.seconds, staleness=float(history.staleness.iloc[steps // 5:].mean()),
                dispatch_s=totals['forward_seconds'] / totals['dispatches'], calls=totals['calls'] / steps, experts=statistics.mean(experts))


def rest(swarm): swarm.portal.run(trio.sleep, AT_REST)  # on either clock


def look_up(swarm, another: Callable[[], Swarm]) -> dict:
    "Seconds, at a constant delay"
    clock, choices = swarm.roster.clock, []
    def timed(key):
        began = clock()
        swarm.portal.run(partial(swarm.dht.get, [key], max_age=0.))
        return clock() - began
    rest(swarm)
    for _ in range(5):
        with another() as other, Weather(delay=Constant(0.1)).over(other), torch.no_grad():
            layer = DMoE(other, 64, grid=GRID, k=K).eval()
            layer(torch.randn(64, 64))
            choices.append(layer.stats.totals()['choose_seconds'])
    with Weather(delay=Constant(0.1)).over(swarm): looks = [timed(f'experts/ffn.{i % GRID[0]}') for i in range(9)]
    return dict(select_s=statistics.median(choices), lookup_s=statistics.median(looks))


def job(swarm, another: Callable[[], Swarm], steps: int, in_flight: int, weather: Weather) -> dict:
    return look_up(swarm, another) | train(swarm, steps, in_flight, weather)


def calls_at_rest(swarm) -> float:
    "That peers make in a second"
    made = lambda: sum(peer.network.calls for peer in swarm.peers)
    rest(swarm)
    before = made()
    rest(swarm)
    return (made() - before) / AT_REST


def cpu(processes) -> float: return sum(sum(p.cpu_times()[:2]) for p in processes)


def measured_costs(peers: int, steps: int = 100) -> Costs:
    "What a batch takes here, of the trainer and of its peers, by its rows"
    made = rehearse(calls_at_rest, peers=peers, experts=PATTERN, copies=COPIES)
    with Swarm.local(peers, PATTERN, hidden_dim=64) as swarm:
        hosts, here = [psutil.Process(peer.pid) for peer in swarm.peers], [psutil.Process()]
        rest(swarm)
        idle, began = cpu(hosts), time.monotonic()
        rest(swarm)
        idle = (cpu(hosts) - idle) / (time.monotonic() - began)
        call = idle / made / 2  # at either end, and both are peers
        train(swarm, 20, 1, Weather())
        theirs, ours, experts = {}, {}, {}
        for rows in ROWS_OF_A_BATCH, 4 * ROWS_OF_A_BATCH:
            before, began = (cpu(hosts), cpu(here)), time.monotonic()
            told = train(swarm, steps, 1, Weather(), rows)
            theirs[rows] = (cpu(hosts) - before[0] - idle * (time.monotonic() - began)) / steps - told['calls'] * call
            ours[rows] = (cpu(here) - before[1]) / steps - told['calls'] * call
            experts[rows] = told['experts']
    few, many = theirs  # experts * each + pairs of a row and an expert * pair = what the peers took, for both
    (one, more), (pairs, pairs_more) = (experts[few], experts[many]), (K * few, K * many)
    pair = max(0., (theirs[many] - theirs[few] * more / one) / (pairs_more - pairs * more / one))
    each = max(0., theirs[few] - pairs * pair) / one
    trunk = max(ours[few], 0.)
    handshake = Costs.handshake * call / Costs.call  # as much quicker or slower as calls are here
    return Costs(call=call, handshake=handshake, forward=(0.3 * each, 0.3 * pair), backward=(0.7 * each, 0.7 * pair), trunk=(0.4 * trunk, 0.6 * trunk))


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--peers', type=int, nargs='+', default=[4, 16, 32])
    parse.add_argument('--rows', type=int, nargs='+', default=range(len(ROWS)), help='which of the rows')
    parse.add_argument('--steps', type=int, default=300)
    parse.add_argument('--seed', type=int, default=0)
    parse.add_argument('--json', action='store_true')
    args = parse.parse_args()
    torch.set_num_threads(1)
    for peers in args.peers:
        costs = measured_costs(peers)
        if not args.json: print(f'{peers} peers: {costs}')
        for in_flight, delay, drop in [ROWS[i] for i in args.rows]:
            weather = Weather(delay=delay / 1000, drop=drop, seed=args.seed)
            with Swarm.local(peers, PATTERN, hidden_dim=64) as swarm: real = job(swarm, lambda: Swarm.join(swarm.addrs), args.steps, in_flight, weather)
            made = rehearse(lambda swarm: job(swarm, swarm.another, args.steps, in_flight, weather), peers=peers, experts=PATTERN, copies=COPIES, costs=costs,
                            cores=cores(), seed=args.seed)
            row = dict(date=f'{datetime.date.today()}', **made_by(), peers=peers, in_flight=in_flight, delay_ms=delay, drop=drop)
            for name in 'lookup_s', 'select_s', 'dispatch_s', 'samples_per_s', 'staleness':
                row |= {name: round(real[name], 3), f'{name}_rehearsed': round(made[name], 3)}
                if real[name]: row[f'{name}_ratio'] = round(made[name] / real[name], 3)
            print(json.dumps(row) if args.json else '   '.join(f'{name} {value}' for name, value in row.items()), flush=True)


if __name__ == '__main__': main()
