"Peers in memory, under a clock that skips the waiting"
import os

import trio, trio.testing

from lah_nb.network import DHT
from lah_nb.simulation.world import _one_seed


def simulate(afn):
    "Run `afn()`, the same way each time; `LAH_SEED=7 pytest ...` tries another"
    with _one_seed(int(os.environ.get('LAH_SEED', 0)), signed=True): return trio.run(afn, clock=trio.testing.MockClock(autojump_threshold=0))


async def start(hub, n, nursery):
    "The DHTs of `n` peers, each joined through one of those before it; all have looked around"
    dhts = []
    for _ in range(n):
        dht = DHT(hub.peer(), clock=trio.current_time)
        await nursery.start(dht.run)
        if dhts: await dht.join({(first := hub.random.choice(dhts)).peer_id: first.network.addrs})
        dhts.append(dht)
    while any(dht.new_here for dht in dhts): await trio.sleep(0.1)
    return dhts
