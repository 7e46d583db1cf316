"Who has the swarm's key is in, who has not is told what to do"
import json, subprocess, sys

import pytest, trio

from lah_nb import Swarm
from lah_nb.errors import LahError
from lah_nb.network import DHT, Host, SwarmKey


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
