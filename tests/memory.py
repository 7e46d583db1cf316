"Peers in memory, under a clock that skips the waiting"
import trio, trio.testing

from lah_nb.network import DHT


def simulate(afn): return trio.run(afn, clock=trio.testing.MockClock(autojump_threshold=0))


async def start(hub, n, nursery):
    "The DHTs of `n` peers, each joined through one of those before it"
    dhts = []
    for _ in range(n):
        dht = DHT(hub.peer(), clock=trio.current_time)
        await nursery.start(dht.run)
        if dhts: await dht.join({(first := hub.random.choice(dhts)).peer_id: first.network.addrs})
        dhts.append(dht)
    return dhts
