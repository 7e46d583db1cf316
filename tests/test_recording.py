"What happens, written down and played: every cut, every bound, hostile files, the same seed, a real swarm, and a slider"
import shutil, subprocess, sys, time

import msgpack, pytest, torch

from lah_nb import DMoE, Recording, Swarm
from lah_nb.command.cli import main
from lah_nb.errors import LahError
from lah_nb.network import EventLog, read_events
from lah_nb.network.events import ENDS, KINDS, MAGIC
from lah_nb.simulation import simulate
from lah_nb.views.figures import report


def write(path, calls=20, every=0.1, **options):
    "Two peers call a third, which fails in the midst of it"
    now = iter(range(10**9))
    with EventLog(path, clock=lambda: next(now) * every, **options) as log:
        for name in 'abc': log.note('join', f'peer-{name}')
        for i in range(calls):
            if i == calls // 2: log.note('failure', 'peer-c')
            log.call('answered' if i < calls // 2 else 'lost', f'peer-{"ab"[i % 2]}', 'peer-c', 'call.forward', every / 2)
    return log


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / 'log'
    with EventLog(path, clock=lambda: 1.) as log:
        for kind in KINDS: log.note(kind, 'a', 'b', f'why {kind}')
        for how in ENDS: log.call(how, 'b', 'a', 'call.x', 1.25)
    told = read_events(path)
    assert [(e.kind, e.peer, e.other, e.what) for e in told.events[:len(KINDS)]] == [(kind, 'a', 'b', f'why {kind}') for kind in KINDS]
    assert [(e.kind, e.peer, e.other, e.how, e.seconds) for e in told.events[len(KINDS):]] == [('call', 'b', 'a', how, 1.25) for how in ENDS]
    assert told.whole and not told.full and told.sparse == 1 and path.stat().st_size == log.size < 250


def test_a_call_takes_a_few_bytes(tmp_path):
    few, many = write(tmp_path / 'few', 10).size, write(tmp_path / 'many', 1010).size
    assert (many - few) / 1000 < 13


def test_it_is_read_wherever_it_is_cut_off(tmp_path):
    write(tmp_path / 'log')
    data, events = (tmp_path / 'log').read_bytes(), read_events(tmp_path / 'log').events
    seen = []
    for n in range(len(MAGIC), len(data)):
        (tmp_path / 'torn').write_bytes(data[:n])
        part = read_events(tmp_path / 'torn')
        seen.append(len(part.events))
        assert part.events == events[:seen[-1]]
        if n % 37 == 0: Recording(tmp_path / 'torn').view(3)
    assert seen == sorted(seen) and set(seen) == set(range(len(events)))


def test_what_is_on_the_disk_is_there_while_it_is_written(tmp_path):
    now = [0.]
    with EventLog(tmp_path / 'log', clock=lambda: now[0]) as log:
        for now[0] in (0.5, 2.): log.note('join', 'a')
        assert len(read_events(tmp_path / 'log').events) == 2


@pytest.mark.parametrize('most', [300, 5_000, 60_000])
def test_it_stays_within_its_size(tmp_path, most):
    log = write(tmp_path / 'log', 20_000, most=most)
    told = read_events(tmp_path / 'log')
    assert (tmp_path / 'log').stat().st_size == log.size <= most and told.whole
    if most > 1000:
        calls = [e for e in told.events if e.kind == 'call']
        assert 10_000 < sum(e.of for e in calls) < 40_000 and told.sparse > 1
        assert [e.kind for e in told.events if e.kind != 'call'] == ['join'] * 3 + ['failure']
        assert f'of {told.sparse} calls' in repr(Recording(tmp_path / 'log'))


HOSTILE = [
    [0, 1, 0, 0, 7, 5], [0, 1, 0, 0, -1, 5], [0, -1, 0, 0, 0, 5], [0, 1, 0, 0, 0, -5], [0, 1, 0, 0], [0, 1, 0, 0, 0, 'x'], [99, 1], [4, 1, 0, 0, 3], [17, 0], [17, 1 << 40],
    [16, 5], {'a': 1}, 'text', None, [[0]], [0, 1.5, 0, 0, 0, 1]]


@pytest.mark.parametrize('item', HOSTILE, ids=str)
def test_what_cannot_be_an_event_ends_it(tmp_path, item):
    path = tmp_path / 'log'
    path.write_bytes(MAGIC + msgpack.packb([16, 'a']) + msgpack.packb([4, 10, 1, 0, 0]) + msgpack.packb(item) + msgpack.packb([4, 10, 1, 0, 0]))
    told = read_events(path)
    assert len(told.events) == 1 and not told.whole


def test_files_that_are_none(tmp_path):
    for data in b'', b'lah', b'\x93NUMPY':
        (tmp_path / 'log').write_bytes(data)
        with pytest.raises(LahError, match='no recording'): Recording(tmp_path / 'log')
    with pytest.raises(LahError, match='cannot be read'): Recording(tmp_path / 'nothing')
    with pytest.raises(LahError, match='cannot be written'): EventLog(tmp_path / 'no' / 'folder', clock=time.monotonic)


def test_a_full_disk_ends_the_log_with_one_warning(caplog):
    log = write('/dev/full', 10_000)
    assert log.why == 'cut off: No space left on device'
    assert [r.message for r in caplog.records if 'cannot be written any more' in r.message] == ['/dev/full cannot be written any more (No space left on device): what happens from now on is not recorded']


def test_names_are_escaped(tmp_path):
    with EventLog(tmp_path / 'log', clock=lambda: 0.) as log: log.call('lost', '<b>', '<i>', '<script>', 1.)
    page = Recording(tmp_path / 'log').view(2).to_json()
    assert '<b>' not in page and '<script>' not in page


def test_nothing_at_all(tmp_path):
    with EventLog(tmp_path / 'log', clock=lambda: 0.): pass
    recording = Recording(tmp_path / 'log')
    assert len(recording.view(2).frames) == 2 and recording.waterfall() and len(recording.frame) == 0


def test_the_figure_has_frames_and_a_slider(tmp_path):
    write(tmp_path / 'log')
    fig = Recording(tmp_path / 'log').view(10)
    slider, buttons = fig.layout.sliders[0], fig.layout.updatemenus[0].buttons
    assert [step.args[0][0] for step in slider.steps] == [frame.name for frame in fig.frames] and len(buttons) == 2
    assert {len(frame.traces) for frame in fig.frames} == {len(frame.data) for frame in fig.frames}
    said = [frame.data[8].text[0] for frame in fig.frames]
    assert '3 of 3 peers are there' in said and said[-1] == '2 of 3 peers are there'


def test_many_peers_are_a_sample_and_that_is_said(tmp_path):
    with EventLog(tmp_path / 'log', clock=lambda: 0.) as log:
        for i in range(4000): log.note('join', f'peer-{i}')
    fig = Recording(tmp_path / 'log').view(2)
    assert fig.layout.annotations[-1].text == '1,500 of 4,000 peers are shown' and len(fig.data[2].x) == 1500


def test_a_report_plays_it(tmp_path):
    write(tmp_path / 'log')
    page = report(tmp_path / 'r.html', recording=Recording(tmp_path / 'log')).read_text()
    assert 'What happened' in page and 'Plotly.addFrames' in page and 'Plotly.animate' not in page.split('Plotly.addFrames')[-1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium')
def test_it_plays_in_a_browser_without_a_kernel(tmp_path):
    browser = pytest.importorskip('browser').browser
    write(tmp_path / 'log')
    report(tmp_path / 'r.html', recording=Recording(tmp_path / 'log'))
    said = "document.querySelector('.js-plotly-plot').data[8].text[0]"
    with browser() as context:
        page = context.new_page()
        page.goto((tmp_path / 'r.html').as_uri())
        page.wait_for_selector('.slider-rail-touch-rect')
        rail = page.locator('.slider-rail-touch-rect').bounding_box()
        for share, words in (0.98, '2 of 3 peers are there'), (0.25, '3 of 3 peers are there'):
            page.mouse.click(rail['x'] + share * rail['width'], rail['y'] + rail['height'] / 2)
            page.wait_for_function(f'() => {said} === {words!r}', timeout=20_000)
        page.locator('.updatemenu-button').first.click()  # play to the end
        page.wait_for_function(f"() => {said} === '2 of 3 peers are there'", timeout=40_000)
        assert not context.left


def test_reading_needs_no_torch_and_no_libp2p(tmp_path):
    write(tmp_path / 'log')
    code = 'import sys\nfor name in ("torch", "libp2p", "sklearn"): sys.modules[name] = None\nfrom lah_nb.views import Recording\nRecording(sys.argv[1]).view(2)'
    subprocess.run([sys.executable, '-c', code, tmp_path / 'log'], check=True)


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in ('a', 3), ('b', 3), ('c', 4): simulate(24, dead=0.25, seconds=18., seed=seed, record=tmp_path / name)
    a, b, c = [(tmp_path / name).read_bytes() for name in 'abc']
    assert a == b != c
    recording = Recording(tmp_path / 'a')
    kinds = recording.frame.kind.value_counts()
    assert kinds['failure'] == 6 and kinds['join'] > 24 and recording.whole
    failed = recording.frame[recording.frame.kind == 'failure']
    after = recording.calls[recording.calls.t > failed.t.max()]
    assert not set(after.peer) & set(failed.peer)  # the dead call nobody
    assert not set(after.other[after.how == 'answered']) & set(failed.peer)  # and answer nobody


def test_recording_changes_nothing(tmp_path):
    spent = 'seconds', 'cpu_seconds', 'memory_mib'
    without, with_it = [simulate(20, seconds=18., seed=1, record=record) for record in (None, tmp_path / 'log')]
    assert {k: v for k, v in without.items() if k not in spent} == {k: v for k, v in with_it.items() if k not in spent}


def test_the_command_records(tmp_path, capsys):
    assert main(['simulate', 'index', '--peers', '20', '--record', str(tmp_path / 'log')]) == 0
    assert len(Recording(tmp_path / 'log').peers) >= 20


def test_a_real_swarm_is_recorded(tmp_path):
    torch.manual_seed(0)
    with Swarm.local(peers=2, experts='ffn.[0:4].[0:2]', hidden_dim=16) as swarm:
        layer, call = DMoE(swarm, 16, grid=(4, 2), k=3), swarm.network.call
        def heard(kind):
            deadline = time.monotonic() + 60
            while not any(e.kind == kind for e in read_events(tmp_path / 'log').events):
                layer(torch.randn(4, 16))
                assert time.monotonic() < deadline
        with swarm.record(tmp_path / 'log') as log:
            heard('join')
            swarm.peers[1].kill()
            heard('failure')
            victim = swarm.local_peers[1].peer_id
        assert log.why == 'closed' and swarm.network.call == call
        size = log.size
        layer(torch.randn(4, 16))
        assert log.size == size
    recording = Recording(tmp_path / 'log')
    assert recording.whole and victim in set(recording.frame[recording.frame.kind == 'failure'].peer)
    assert (recording.calls.what == 'call.forward').any() and swarm.network.peer_id in set(recording.calls.peer)
    assert len(recording.view(8).frames) == 8


def test_a_swarm_that_is_closed_ends_its_recording(tmp_path):
    with Swarm.local(peers=1, experts='ffn.[0:2]', hidden_dim=8) as swarm:
        with swarm.record(tmp_path / 'log'): swarm.close()
    assert Recording(tmp_path / 'log').whole
    with pytest.raises(LahError, match='closed'): swarm.record(tmp_path / 'log')
