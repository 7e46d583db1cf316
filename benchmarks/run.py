"""Everything that speed means here, in one go: ours beside hivemind's and beside the limit, taken in turns on this machine.

    python benchmarks/run.py [--quick] [--parts step call tensor memory start] [--no-hivemind] [--json] [--keep]

`step`: forward and backward of a DMoE of 16 x 16 ffn(64), k = 4, SGD, over four servers. `call`: one row through one nop(64). `tensor`: a large one
both ways. `memory`: trainer, bootstrap peer, server. `start`: a local swarm from nothing to its first step. `--keep` adds the ratios to history.jsonl.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
HISTORY = HERE.parent / 'nbs' / 'experiments' / 'history.jsonl'  # drawn by the page beside it
PARTS = 'step', 'call', 'tensor', 'memory', 'start'
ONE_THREAD = {name: '1' for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}
os.environ.update(ONE_THREAD)

import psutil
import torch
import trio

from lah_nb import DMoE, Swarm
from lah_nb.swarm.children import LocalPeer
from vs_hivemind import hivemind_python, measure

torch.set_num_threads(1)
MIB = 1 << 20


def median_ms(work, repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def rss(pid: int) -> int: return round(psutil.Process(pid).memory_info().rss / MIB)


def step(quick: bool, hivemind: bool) -> dict:
    "Samples a second by batch size, medians; each side starts afresh in each round"
    ours = {'1': 40, '8': 25, '32': 25, '256': 10}
    job = dict(peers=4, grid=[16, 16], hidden_dim=64, k=4, lr=0.01)
    sides = {'lah_nb': (sys.executable, 'lah_side.py', job | dict(batches=ours)), 'limit': (sys.executable, 'limit_side.py', job | dict(batches=ours))}
    if hivemind:
        theirs = dict(batches={'1': 20, '8': 8, '32': 5}, block='paper', handlers=4)
        sides['hivemind'] = hivemind_python(), 'hivemind_side.py', job | theirs
    seconds = {side: {} for side in sides}
    for _ in range(1 if quick else 3):
        for side, (python, script, its_job) in sides.items():
            found, _ = measure(python, script, its_job, 300)
            for batch, times in found.items(): seconds[side].setdefault(batch, []).extend(times)
    rates = {side: {batch: round(int(batch) / statistics.median(times), 1) for batch, times in found.items()} for side, found in seconds.items()}
    ratio = lambda side: {batch: round(rates['lah_nb'][batch] / rate, 2) for batch, rate in rates[side].items()}
    return dict(samples_per_s=rates, of_limit=ratio('limit'), **(dict(times_hivemind=ratio('hivemind')) if hivemind else {}))


def call(quick: bool, hivemind: bool) -> dict:
    "Milliseconds of one row through one nop(64), and calls a second with 64 in flight"
    repeats = 100 if quick else 500
    with Swarm.local(peers=1, experts='nop.[0:1]', expert_cls='nop', hidden_dim=64) as swarm:
        layer, x = DMoE(swarm, in_dim=64, grid=(1,), uid_prefix='nop', k=1), torch.randn(1, 64, requires_grad=True)
        peer_id, network = swarm.peers[0].peer_id, swarm.network
        meta = dict(uids=['nop.0'], counts=[1], seed=0, id=b'', rate=1.)
        rows = [x.detach(), torch.zeros(1, dtype=torch.int32)]
        ping = lambda: network.call(peer_id, 'call.ping', {}, timeout=5.)
        bare = lambda: network.call(peer_id, 'call.forward', meta, rows, timeout=5.)
        async def many(what, lines: int = 64, each: int = repeats // 5):
            async def line():
                for _ in range(each): await what()
            start = trio.current_time()
            async with trio.open_nursery() as nursery:
                for _ in range(lines): nursery.start_soon(line)
            return lines * each / (trio.current_time() - start)
        def forward():
            with torch.no_grad(): layer(x)
        return dict(
            ping_ms=round(median_ms(lambda: swarm.portal.run(ping), repeats), 2), bare_forward_ms=round(median_ms(lambda: swarm.portal.run(bare), repeats), 2),
            forward_ms=round(median_ms(forward, repeats), 2), with_backward_ms=round(median_ms(lambda: layer(x).sum().backward(), repeats), 2),
            pings_per_s=round(swarm.portal.run(many, ping)), calls_per_s=round(swarm.portal.run(many, bare)))


def tensor(quick: bool, hivemind: bool) -> dict:
    "Logical MB/s of a tensor that goes to one nop and comes back, through the layer; and the trainer's memory afterwards"
    found = {}
    for mib in (1, 16) if quick else (1, 16, 64):
        dim = mib * MIB // 4 // 2048
        with Swarm.local(peers=1, experts='nop.[0:1]', expert_cls='nop', hidden_dim=dim) as swarm:
            x = torch.randn(2048, dim)
            for codec in ('none', 'float16', 'blockwise8') if mib == 16 else ('none',):
                layer = DMoE(swarm, in_dim=dim, grid=(1,), uid_prefix='nop', k=1, compression=codec)
                def forward():
                    with torch.no_grad(): layer(x)
                name = f'{mib}_mib' if codec == 'none' else f'{mib}_mib_{codec}'
                found[name] = round(2 * mib / median_ms(forward, 5 if quick else 11) * 1e3)
    return dict(mb_per_s=found, trainer_mib=rss(os.getpid()))


def memory(quick: bool, hivemind: bool) -> dict:
    "MiB of a bootstrap peer, and of a server of 64 ffn(64) when it is ready and after Adam's steps"
    peer = LocalPeer()
    try:
        peer.wait_ready()
        time.sleep(1)
        bootstrap = rss(peer.pid)
    finally: peer.stop()
    with Swarm.local(peers=1, experts='ffn.[0:8].[0:8]', expert_cls='ffn', hidden_dim=64) as swarm:
        ready = rss(swarm.peers[0].pid)
        layer = DMoE(swarm, in_dim=64, grid=(8, 8), k=4)
        for _ in range(30 if quick else 90): layer(torch.randn(64, 64, requires_grad=True)).square().mean().backward()
        return dict(bootstrap_mib=bootstrap, server_mib=ready, server_after_mib=rss(swarm.peers[0].pid))


FIRST_STEP = '''
import torch
from lah_nb import DMoE, Swarm
with Swarm.local(peers=4, experts='ffn.[0:8].[0:8]', expert_cls='ffn', hidden_dim=64) as swarm:
    DMoE(swarm, in_dim=64, grid=(8, 8), k=4)(torch.randn(8, 64, requires_grad=True)).sum().backward()
    print('done', flush=True)
'''


def start(quick: bool, hivemind: bool) -> dict:
    "Seconds from a fresh Python to the first step of a local swarm of 4 peers and 64 experts; beside it torch's import, alone and four at once"
    def until(lines: list[str]) -> float:
        began = time.perf_counter()
        run = [subprocess.Popen([sys.executable, '-c', line], stdout=subprocess.PIPE, text=True) for line in lines]
        too_long = threading.Timer(120, lambda: [process.kill() for process in run])
        too_long.start()
        try:
            for process in run: assert process.stdout.readline() == 'done\n', 'it failed, or took longer than two minutes'
            seconds = time.perf_counter() - began
            for process in run: process.communicate()
        finally: too_long.cancel()
        return seconds
    again = range(1 if quick else 5)
    alone = 'import torch; print("done", flush=True)'
    cases = dict(first_step_s=[FIRST_STEP], torch_s=[alone], four_torch_s=[alone] * 4)
    return {name: round(statistics.median(until(lines) for _ in again), 2) for name, lines in cases.items()}


def about() -> dict:
    "When and on what this ran"
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=HERE, capture_output=True, text=True)
    return dict(date=date.today().isoformat(), commit=git.stdout.strip(), cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
                load_before=round(os.getloadavg()[0], 1))


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--quick', action='store_true', help='fewer repeats: some two minutes')
    parse.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parse.add_argument('--no-hivemind', action='store_true', help='do not make an environment for hivemind, and do not run it')
    parse.add_argument('--json', action='store_true', help='one JSON object as the last line')
    parse.add_argument('--keep', action='store_true', help=f'add a line to {HISTORY.name}')
    args = parse.parse_args()
    found = about()
    for part in args.parts:
        found[part] = globals()[part](args.quick, not args.no_hivemind)
        if not args.json: print(f'{part}: ' + ', '.join(f'{name} {value}' for name, value in found[part].items()), flush=True)
    if args.json: print(json.dumps(found))
    if args.keep:
        with HISTORY.open('a') as file: print(json.dumps(found), file=file)


if __name__ == '__main__': main()
