"Who has the swarm's key is in, who has not is told what to do"
import json, os, subprocess, sys

import pytest, trio
from conftest import until
from libp2p.peer.id import ID

from lah_nb import Swarm, volunteer
from lah_nb.errors import LahError
from lah_nb.network import DHT, Host, NoPeers, NotMember, Refused, RelayError, SwarmKey, load_identity, new_identity, peer_id_of
from lah_nb.network.relay import reserve


@pytest.fixture
def key(tmp_path):
    file = tmp_path / 'swarm.key'
    file.write_text('0123456789abcdef' * 4)
    return str(file)


def hosts(scene, *secrets):
    "Run `scene` with a host for each secret; None: it has no key"
    async def main():
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                made = []
                for secret in secrets:
                    host = Host()
                    if secret:
                        host.key = SwarmKey(secret)
                        for protocol in 'call', 'dht': host.serve(f'{protocol}.enter', host._admit)
                    await nursery.start(host.run)
                    made.append(host)
                await scene(*made)
                nursery.cancel_scope.cancel()
    trio.run(main)


def test_members_call_each_other_and_strangers_are_refused_both_ways():
    async def scene(a, b, stranger, other):
        async def ask(x, y, protocol='call'):
            x.learn(y.peer_id, y.addrs)
            await x.call(y.peer_id, f'{protocol}.ping', {}, timeout=5.)
        for protocol in 'call', 'dht':
            await ask(a, b, protocol)
            await ask(b, a, protocol)
        for host in stranger, other:
            with pytest.raises(LahError, match='--swarm-key|does not have the key'): await ask(host, a)
            with pytest.raises(LahError, match='does not have the key'): await ask(b, host)
    hosts(scene, b'k' * 16, b'k' * 16, None, b'z' * 16)


def test_a_stranger_cannot_read_records_nor_leave_any():
    async def scene(a, stranger):
        async with trio.open_nursery() as nursery:
            inside, outside = DHT(a), DHT(stranger)
            for dht in inside, outside: await nursery.start(dht.run)
            with pytest.raises(LahError): await outside.join({a.peer_id: a.addrs})
            for method in 'dht.find', 'dht.store':
                with pytest.raises(LahError, match='swarm-key'): await stranger.call(a.peer_id, method, {}, timeout=5.)
            nursery.cancel_scope.cancel()
    hosts(scene, b'k' * 16, None)


def test_a_swarm_of_processes_with_a_key(key, monkeypatch):
    monkeypatch.setenv('LAH_SWARM_KEY', key)
    with Swarm.local(1, 'ffn.[0:2]', hidden_dim=8) as swarm:
        assert swarm.snapshot(timeout=5.).experts == 2
        command = [sys.executable, '-c', 'import sys; from lah_nb.command.cli import main; sys.exit(main())', 'status', '--join', swarm.addrs[0], '--json']
        monkeypatch.delenv('LAH_SWARM_KEY')
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1, refused
        told = subprocess.run([*command, '--swarm-key', key], capture_output=True, text=True, timeout=60)
        assert json.loads(told.stdout.splitlines()[-1])['experts'] == 2, told


def with_lists(scene, *lists):
    "Run `scene` with a host for each list of the numbers of those that it allows; None: it has no list"
    keys = [new_identity(bytes([i]) * 32) for i in range(len(lists))]
    async def main():
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                made = []
                for identity, members in zip(keys, lists):
                    host = Host(identity=identity, allow=members and ','.join(peer_id_of(keys[i]) for i in members))
                    await nursery.start(host.run)
                    made.append(host)
                for host in made:
                    for other in made: host.learn(other.peer_id, other.addrs)
                await scene(*made)
                nursery.cancel_scope.cancel()
    trio.run(main)


def test_members_call_each_other_and_strangers_are_told_so_on_both_sides():
    async def scene(a, b, stranger):
        await a.call(b.peer_id, 'call.ping', {}, timeout=5.)
        for method in 'call.ping', 'dht.ping':
            with pytest.raises(Refused, match=f'{stranger.peer_id} is not on it.*--identity'): await stranger.call(a.peer_id, method, {}, timeout=5.)
            with pytest.raises(NotMember, match='is not on it'): await a.call(stranger.peer_id, method, {}, timeout=5.)
        dht, outside = DHT(a), DHT(stranger)
        async with trio.open_nursery() as nursery:
            for each in dht, outside: await nursery.start(each.run)
            with pytest.raises(NoPeers, match='list of members.*#members'): await outside.join({a.peer_id: a.addrs}, timeout=3.)
            assert stranger.peer_id not in dht.peers
            nursery.cancel_scope.cancel()
    with_lists(scene, [0, 1], [0, 1], None)


def test_a_list_is_read_again_and_who_is_taken_off_it_is_out(tmp_path):
    file, keys = tmp_path / 'members', [new_identity(bytes([i]) * 32) for i in range(2)]
    file.write_text(peer_id_of(keys[1]))
    async def main():
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                a, b = Host(identity=keys[0], allow=file), Host(identity=keys[1])
                for host in a, b: await nursery.start(host.run)
                b.learn(a.peer_id, a.addrs)
                await b.call(a.peer_id, 'call.ping', {}, timeout=5.)
                file.write_text(f'{peer_id_of(keys[0])}  # only itself\n')
                while b.peer_id in a.allowed: await trio.sleep(0.1)
                with pytest.raises(Refused, match='list of members'): await b.call(a.peer_id, 'call.ping', {}, timeout=5.)
                nursery.cancel_scope.cancel()
    trio.run(main)


def test_a_relay_passes_on_for_members_only():
    async def scene(_, member, stranger):
        key = new_identity(b'r' * 32)
        async with trio.open_nursery() as nursery:
            relay = Host(identity=key, relay=True, allow=f'{member.peer_id},{_.peer_id}')
            await nursery.start(relay.run)
            for host in member, stranger: host.learn(relay.peer_id, relay.addrs)
            await member.call(relay.peer_id, 'call.ping', {}, timeout=5.)
            await reserve(member._host, ID.from_base58(relay.peer_id))
            with pytest.raises(Refused): await stranger.call(relay.peer_id, 'call.ping', {}, timeout=5.)
            with pytest.raises(RelayError, match='permission'): await reserve(stranger._host, ID.from_base58(relay.peer_id))
            nursery.cancel_scope.cancel()
    with_lists(scene, None, None, None)


@pytest.mark.slow
def test_a_swarm_of_processes_with_members(tmp_path, monkeypatch):
    identity = tmp_path / 'mine.key'
    me = peer_id_of(load_identity(identity))
    with Swarm.local(2, 'ffn.[0:4]', hidden_dim=8, allow=me) as swarm:
        assert swarm.snapshot(timeout=5.).experts == 4
        swarm.start_peers(1, 'ffn.[4:6]', hidden_dim=8)  # who came before takes it in
        until(lambda: swarm.snapshot(timeout=5.).experts == 6)
        folder = swarm._own.name
        command = [sys.executable, '-c', 'import sys; from lah_nb.command.cli import main; sys.exit(main())', 'status', '--join', swarm.addrs[0], '--json']
        told = subprocess.run([*command, '--identity', str(identity)], capture_output=True, text=True, timeout=60)
        assert json.loads(told.stdout.splitlines()[-1])['experts'] == 6, told
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1 and 'list of members' in refused.stderr and '#members' in refused.stderr, refused
        with pytest.raises(LahError, match='list of members'): Swarm.join(swarm.addrs[0], timeout=5.)
        with Swarm.join(swarm.addrs[0], identity=identity) as joined: assert joined.snapshot(timeout=5.).experts == 6
        monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path))
        with pytest.raises(LahError, match='list of members'): volunteer(swarm.addrs[0], 2)
        with volunteer(swarm.addrs[0], 2, identity=str(identity)) as vol: assert vol.peer_id == me
    assert not os.path.exists(folder)


def test_a_panel_takes_key_and_members(key, tmp_path):
    from lah_nb import PeerPanel
    panel = PeerPanel()
    panel.count.value, panel.uids.value, panel.hidden_dim.value = 1, 'ffn.[0:2]', 8
    panel.key.value, panel.allow.value = key, peer_id_of(load_identity(tmp_path / 'mine.key'))
    panel.start_peers()
    other = PeerPanel()
    try:
        assert panel.swarm.network.key and panel.swarm.network.allowed
        assert panel.swarm.snapshot(timeout=5.).experts == 2
        other.addr.value, other.key.value = panel.swarm.addrs[0], key
        with pytest.raises(LahError, match='list of members'): other.join()
        other.identity.value = str(tmp_path / 'mine.key')
        other.join()
        assert other.swarm.snapshot(timeout=5.).experts == 2
    finally:
        for each in other, panel:
            if each.swarm: each.swarm.close()
            each.close()
