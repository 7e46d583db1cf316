"A JavaScript libp2p peer (TCP, Noise, Yamux) dials, identifies and pings one of ours"
import json
import shutil
from pathlib import Path

import pytest
import trio

from lah_nb.network import Host

JS = Path(__file__).parent / 'js'


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('node') or not (JS / 'node_modules').is_dir(), reason='needs node, and `npm ci --prefix tests/js`')
def test_javascript_peer_dials_identifies_and_pings():
    async def main():
        host = Host(listen=['/ip4/127.0.0.1/tcp/0'])
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            with trio.fail_after(60): ended = await trio.run_process(['node', JS / 'peer.js', host.addrs[0]], capture_stdout=True, capture_stderr=True, check=False)
            nursery.cancel_scope.cancel()
        return host, ended
    host, ended = trio.run(main)
    assert ended.returncode == 0, ended.stderr.decode()
    seen = json.loads(ended.stdout)
    assert seen['peer_id'] == host.peer_id and seen['encryption'] == '/noise' and seen['multiplexer'].startswith('/yamux/')
    assert len(seen['pings']) == 3 and '/lah/call/1' in seen['protocols'] and seen['agent'].startswith('py-libp2p/')
