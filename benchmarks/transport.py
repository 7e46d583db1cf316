"""Calls between two processes on one machine: latency of 1 KB, MB/s (2**20 bytes) of 16 MiB up and down: by a shortcut, through libp2p with our tuning, and as libp2p comes.

    python benchmarks/transport.py [--json]
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import trio

from lah_nb.network import Host, split_addr

BIG = torch.zeros(16 << 18)  # 16 MiB


async def serve():
    host = Host(listen=['/ip4/127.0.0.1/tcp/0'])
    async def echo(request): return {}, request.tensors
    async def sink(request): return {}, ()
    async def source(request): return {}, [BIG]
    for name, handler in dict(echo=echo, sink=sink, source=source).items(): host.serve(f'call.{name}', handler)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        print(host.addrs[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def measure(addr: str) -> dict[str, float]:
    host, (peer, dial) = Host(listen=[]), split_addr(addr)
    host.learn(peer, [dial])

    async def median(method: str, tensors: list, repeats: int) -> float:
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            await host.call(peer, method, {}, tensors, timeout=30)
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        found = dict(call_1kb_ms=1e3 * await median('call.echo', [torch.zeros(256)], 200), up_mb_s=16 / await median('call.sink', [BIG], 10),
                     down_mb_s=16 / await median('call.source', [], 10))
        nursery.cancel_scope.cancel()
    return {name: round(value, 2) for name, value in found.items()}


def one(**turned: str) -> dict[str, float]:
    "Both ends as child processes, since the tuning happens at import"
    env = os.environ | dict(turned, OMP_NUM_THREADS='1')
    server = subprocess.Popen([sys.executable, __file__, '--serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try: return json.loads(subprocess.run([sys.executable, __file__, '--call', server.stdout.readline().strip()], stdout=subprocess.PIPE, text=True, env=env, check=True).stdout)
    finally: server.communicate(timeout=20)


if __name__ == '__main__':
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--json', action='store_true')
    parse.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    parse.add_argument('--call', help=argparse.SUPPRESS)
    args = parse.parse_args()
    torch.set_num_threads(1)
    if args.serve: trio.run(serve)
    elif args.call: print(json.dumps(trio.run(measure, args.call)))
    else:
        found = {'shortcut': one(), 'libp2p, tuned': one(LAH_SHORTCUT='0'), 'as it comes': one(LAH_SHORTCUT='0', LAH_TUNE='0')}
        if args.json: print(json.dumps(found))
        else:
            for name, numbers in found.items(): print(f'{name:>13}: 1 KB call {numbers["call_1kb_ms"]:.2f} ms, 16 MiB up {numbers["up_mb_s"]:.0f} MB/s, down {numbers["down_mb_s"]:.0f} MB/s')
