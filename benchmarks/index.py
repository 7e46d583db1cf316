"""The index over real libp2p on one machine: joining, choosing experts cold and warm, storing and reading.

    python benchmarks/index.py [--peers 64] [--processes 4] [--clients 10] [--rest 60] [--json]

Each peer announces one expert of a 16 x 16 grid; then the swarm rests. Clients come one after another, each new to the swarm: joins it and chooses
the 4 best experts of 64 rows twice. Two that have been members for a while store records, each of its own, and read those of the other, which they
have never read. Medians, in milliseconds.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import trio

from lah_nb.errors import LahError
from lah_nb.mixture.classes import Schema
from lah_nb.mixture.gating import Gate
from lah_nb.mixture.roster import Roster, index_entries
from lah_nb.simulation.scale import GRID, select
from lah_nb.swarm.joining import joined


ACQUAINTED = 40  # records that the two members store and read before times are taken

async def serve(first: int, n: int, join: list[str]):
    "Host peers `first` to `first + n - 1` until the input ends"
    async with trio.open_nursery() as nursery:
        async def live(i, *, task_status=trio.TASK_STATUS_IGNORED):
            async with joined(join) as (host, dht):
                row, column = divmod(i, GRID[1])
                await dht.announce(index_entries([f'ffn.{row}.{column}'], Schema((64,), (64,)), host.reach))
                task_status.started(host.addrs[0])
                await trio.sleep_forever()
        for i in range(first, first + n):
            addr = await nursery.start(live, i)
            join = join or [addr]
        print(addr, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def measure(addrs: list[str], clients: int) -> dict[str, list[float]]:
    times = {name: [] for name in ('join', 'cold', 'warm', 'store', 'get')}

    async def timed(name, afn, *args, **options):
        began = time.perf_counter()
        found = await afn(*args, **options)
        times[name].append(1e3 * (time.perf_counter() - began))
        return found

    for i in range(clients):
        enter = joined(addrs[i % len(addrs):][:1])
        host, dht = await timed('join', enter.__aenter__)
        roster, gate = Roster(host, dht), Gate(64, GRID)
        for name in 'cold', 'warm': await timed(name, select, roster, gate)
        await enter.__aexit__(None, None, None)
        await trio.sleep(1.)
    async with joined(addrs[:1]) as (_, one), joined(addrs[-1:]) as (_, other):
        for i in range(ACQUAINTED + clients):
            if i == ACQUAINTED: times.update(store=[], get=[])
            slot = f'numbers/{i}', 'x'
            await timed('store', one.announce, {slot: b'1'})
            found = await timed('get', other.get, [slot[0]])
            if len(found[slot[0]]) != 1: raise LahError('a record that was stored a moment ago was not found')
            one, other = other, one
    return times


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--peers', type=int, default=64)
    parse.add_argument('--processes', type=int, default=4)
    parse.add_argument('--clients', type=int, default=10)
    parse.add_argument('--rest', type=float, default=60.)
    parse.add_argument('--json', action='store_true')
    parse.add_argument('--serve', nargs=2, type=int, help=argparse.SUPPRESS)
    parse.add_argument('--join', nargs='*', default=[], help=argparse.SUPPRESS)
    args = parse.parse_args()
    torch.set_num_threads(1)
    if args.serve: return trio.run(serve, *args.serve, args.join)
    each, addrs, processes = args.peers // args.processes, [], []
    try:
        for i in range(args.processes):
            command = [sys.executable, __file__, '--serve', str(i * each), str(each), '--join', *addrs[:1]]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            addrs.append(processes[-1].stdout.readline().strip())
        time.sleep(args.rest)
        times = trio.run(measure, addrs, args.clients)
    finally:
        for process in processes: process.stdin.close()
        for process in processes: process.wait(timeout=30)
    told = {'peers': each * args.processes} | {f'{name}_ms': round(statistics.median(spent), 1) for name, spent in times.items()}
    print(json.dumps(told) if args.json else '\n'.join(f'{name:<8} {value}' for name, value in told.items()))


if __name__ == '__main__': main()
