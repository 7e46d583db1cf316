"Whoever is started again goes on where it was: its own uids, what it saved, and in spite of what its dead self announced."
import pytest, trio, trio.testing

from lah_nb.mixture.experts import Expert
from lah_nb.mixture.uids import ExpertError
from lah_nb.mixture.classes import expert_schema
from lah_nb.mixture.packed import load_expert, save_expert
from lah_nb.mixture.server import Server, claim, index_entries, saved_uids
from lah_nb.network import DHT, MemoryHub

SCHEMA = expert_schema('ffn', 16)


async def start(hub, nursery, first=None):
    dht = DHT(hub.peer(), clock=trio.current_time)
    await nursery.start(dht.run)
    if first: await dht.join({first.peer_id: first.network.addrs})
    return dht


def simulate(afn):
    async def main():
        async with MemoryHub(latency=0.01) as hub, trio.open_nursery() as nursery:
            await afn(hub, nursery)
            nursery.cancel_scope.cancel()
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_saved_uids_come_first_unless_another_hosts_them():
    async def main(hub, nursery):
        first = await start(hub, nursery)
        other, again = await start(hub, nursery, first), await start(hub, nursery, first)
        await other.announce(index_entries(['ffn.0.1'], SCHEMA, other.network.reach))
        mine = await claim(again, 'ffn.[0:4].[0:4]', 4, schema=SCHEMA, saved=['ffn.3.3', 'ffn.0.1', 'ffn.2.2', 'other.0.0'])
        assert {'ffn.3.3', 'ffn.2.2'} < set(mine) and len(mine) == 4 and 'ffn.0.1' not in mine
    simulate(main)


@pytest.mark.parametrize('same_identity', [True, False])
def test_the_records_of_a_dead_self_are_not_in_the_way(same_identity):
    async def main(hub, nursery):
        first = await start(hub, nursery)
        before = await start(hub, nursery, first)
        uids = await claim(before, 'ffn.[0:2].[0:2]', 3, schema=SCHEMA)
        await before.announce(index_entries(uids, SCHEMA, before.network.reach))
        if same_identity: after = before
        else:
            before.network.silent = True  # killed
            after = await start(hub, nursery, first)
        assert sorted(await claim(after, 'ffn.[0:2].[0:2]', 3, schema=SCHEMA, saved=uids)) == sorted(uids)
    simulate(main)


def test_what_lives_is_left_to_its_host():
    async def main(hub, nursery):
        first = await start(hub, nursery)
        other, late = await start(hub, nursery, first), await start(hub, nursery, first)
        uids = [f'ffn.0.{i}' for i in range(4)]
        await other.announce(index_entries(uids, SCHEMA, other.network.reach))
        with pytest.raises(ExpertError, match='hosted already'): await claim(late, 'ffn.[0:1].[0:4]', 2, schema=SCHEMA, saved=uids)
    simulate(main)


def test_leaving_saves_everything_even_when_it_is_cut_short(tmp_path):
    async def main(hub, nursery):
        dht = await start(hub, nursery)
        experts = [Expert(f'ffn.0.{i}', 'ffn', 16) for i in range(8)]
        async with trio.open_nursery() as inner:
            await inner.start(Server(dht.network, dht, experts, checkpoint_dir=tmp_path).run)
            inner.cancel_scope.deadline = trio.current_time()
    simulate(main)
    assert sorted(saved_uids(tmp_path)) == [f'ffn.0.{i}' for i in range(8)] and not list(tmp_path.glob('*.part'))


def test_what_was_inherited_is_newer_than_what_was_saved(tmp_path):
    async def main(hub, nursery):
        dht, expert = await start(hub, nursery), Expert('ffn.0.0', 'ffn', 16)
        save_expert(expert, tmp_path)
        expert.updates = 5  # from a living host
        async with trio.open_nursery() as inner:
            await inner.start(Server(dht.network, dht, [expert], checkpoint_dir=tmp_path).run)
            assert expert.updates == 5
            inner.cancel_scope.cancel()
        assert load_expert(again := Expert('ffn.0.0', 'ffn', 16), tmp_path) and again.updates == 5
    simulate(main)
