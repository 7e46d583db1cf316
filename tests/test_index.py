"The index under liars, at rest, and at any number of peers; in memory, under a clock that skips the waiting."
import random

import base58, pytest, trio, trio.testing

from lah_nb.network import DHT, MemoryHub, nearest
from lah_nb.network.contacts import HINTS


def simulate(afn): return trio.run(afn, clock=trio.testing.MockClock(autojump_threshold=0))


async def start(hub, n, nursery):
    dhts = []
    for _ in range(n):
        dht = DHT(hub.peer(), clock=trio.current_time)
        await nursery.start(dht.run)
        if dhts: await dht.join({(first := hub.random.choice(dhts)).peer_id: first.network.addrs})
        dhts.append(dht)
    return dhts


def memory_of(dht):
    "Entries in all that it remembers of others"
    contacts = dht.contacts
    return sum(map(len, (contacts.addrs, contacts.heard, contacts.hints, contacts.standing, contacts.shunned, contacts.lost)))


def invent(hub, dht, rng):
    "From now on this peer names 20 peers that nobody can reach, new ones for every key, the nearest of 100"
    (nobody := hub.peer()).silent = True
    pool = [base58.b58encode(bytes.fromhex('002408011220') + rng.randbytes(32)).decode() for _ in range(4000)]
    hub.peers.update(dict.fromkeys(pool, nobody))
    async def lie(request):
        near, addrs = [], {}
        for key in request.meta['keys']:
            near.append(nearest(key, rng.sample(pool, 100), 20))
            addrs.update({peer: [f'/ip4/192.0.2.1/tcp/{rng.randrange(1, 65536)}'] for peer in near[-1]})
        return {'near': near, 'addrs': addrs, 'found': [[] for _ in near]}, ()
    dht.network.serve('dht.find', lie)


@pytest.mark.parametrize('liars', [1, 3])
def test_who_invents_peers_slows_nobody_down(liars):
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            dhts, rng = await start(hub, 16, nursery), random.Random(0)
            honest = dhts[liars:]
            for i, dht in enumerate(honest): await dht.announce({(f'experts/ffn.{i}', '1'): b'here'})
            keys = [f'experts/ffn.{i}' for i in range(len(honest))]
            async def seconds():
                spent = []
                for dht in honest:
                    began = trio.current_time()
                    found = await dht.get(rng.sample(keys, 4), max_age=0)
                    spent.append(trio.current_time() - began)
                    assert all(len(records) == 1 for records in found.values())
                return spent
            calm = await seconds()
            for liar in dhts[:liars]: invent(hub, liar, rng)
            first = await seconds()
            for _ in range(3):
                await trio.sleep(5)
                later = await seconds()
            remembered = max(map(memory_of, honest))
            await trio.sleep(60)
            last = await seconds()
            assert max(first) <= 2 * max(calm) and max(later + last) <= 2 * max(calm)
            assert all(len(dht.peers) >= 16 - liars - 1 for dht in honest)
            # hints have a bound, and what is older than a minute is gone: flat, not growing with the attack
            assert max(remembered, *map(memory_of, honest)) <= HINTS + 512
            nursery.cancel_scope.cancel()
    simulate(main)
