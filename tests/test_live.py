"What the live views are made of: scenes, frames, curves, tickers and stills, without a browser and without a swarm"
import gc, json, logging, subprocess, sys, time

import numpy as np
import pytest

from lah_nb.views import Shown, Ticker, place_peers
from lah_nb.views.live import curve_svg, image
from lah_nb.views.swarm_view import SHOWN_STATES, encode_frame, Scene
from lah_nb import SwarmView
from lah_nb.views.training_view import MOST_POINTS, Curve


def peer(name, *experts, state='alive', **more): return {'peer_id': name, 'addrs': [f'/dns4/{name}/tcp/1'], 'experts': list(experts), 'alive': state == 'alive', 'state': state, **more}
def moment(*peers, links=(), rates=None, calls=None, own=None): return {'peers': list(peers), 'experts': len({uid for p in peers for uid in p['experts']}), 'links': [list(link) for link in links], 'rates': rates or {}, 'calls': calls or {}, 'own': own}
A, B, C = peer('a', 'ffn.0.0', 'ffn.0.1', updates=9, latency=0.0123), peer('b', 'ffn.1.0'), peer('c', 'ffn.1.1', 'ffn.2.0')


def many(peers=500, each=10, n=71):
    uids = [f'ffn.{i // n}.{i % n}' for i in range(peers * each)]
    ids = [f'12D3KooW{i:044d}' for i in range(peers + 1)]
    return moment(*(peer(ids[i], *uids[i * each:(i + 1) * each]) for i in range(peers)), links=[(ids[i], ids[(7 * i + j) % peers]) for i in range(peers) for j in (1, 2, 3)], rates={uid: float(i % 50) for i, uid in enumerate(uids)}, own=ids[-1])


def test_the_views_need_neither_torch_nor_libp2p():
    code = ('import sys\nfor name in ("torch", "libp2p", "trio", "sklearn"): sys.modules[name] = None  # an import of them fails\n'
            'import lah_nb.views.layout, lah_nb.views.live, lah_nb.views.swarm_view, lah_nb.views.training_view, lah_nb.views.panels, lah_nb.views.figures, lah_nb.views.study\n'
            'from lah_nb import PeerPanel\nassert "no swarm yet" in PeerPanel().still()')
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


def test_who_joins_gets_a_place_and_nobody_else_moves():
    scene = Scene()
    assert scene.update(moment(A, B, links=[('a', 'b'), ('a', 'me')], own='me'))['first'] == (0, 0)
    before = [tuple(at) for at in scene.at]
    assert [p[0] for p in scene.peers] == ['a', 'b', 'me'] and len(before) == 3
    change = scene.update(moment(A, B, C, links=[('a', 'b'), ('b', 'c')], own='me'))
    assert change['first'] == (3, 3) and [p[0] for p in change['peers']] == ['c'] and change['uids'] == ['ffn.1.1', 'ffn.2.0'] and change['hosts'] == [(3, [3, 4])] and change['grids'] == [['ffn', 3, 2]]
    assert [tuple(at) for at in scene.at[:3]] == before and len(scene.at) == 4
    assert scene.update(moment(A, B, C, links=[('a', 'b'), ('b', 'c')], own='me')) is None


def test_who_leaves_is_gone_and_keeps_place_and_experts():
    scene = Scene()
    scene.update(moment(A, B, own='me'))
    told = moment(A, own='me')
    scene.update(told)
    info, frame = encode_frame(scene, told, {})
    assert [SHOWN_STATES[s] for s in frame[:3]] == ['alive', 'gone', 'trainer'] and scene.hosts[1] == [2] and info['own'] == 2 and info['status'].startswith('1 of 2 peers alive')
    told = moment(A, B, own='me')
    scene.update(told)
    assert SHOWN_STATES[encode_frame(scene, told, {})[1][1]] == 'alive' and len(scene.peers) == 3


def test_those_long_gone_leave_the_picture():
    scene, crowd = Scene(), [peer(f'p{i}', f'ffn.{i}.0') for i in range(40)]
    scene.update(moment(*crowd, own='me'))
    stand = dict(zip((p[0] for p in scene.peers), map(tuple, scene.at)))
    assert scene.update(moment(*crowd[16:], own='me'))['first'] == (41, 40) and len(scene.peers) == 41       # sixteen crosses may be seen
    change = scene.update(moment(*crowd[17:], C, own='me'))
    names = [p[0] for p in scene.peers]
    assert change['first'] == (0, 40) and change['peers'] == scene.peers and names == [f'p{i}' for i in range(17, 40)] + ['me', 'c'] and len(scene.at) == len(scene.hosts) == 25
    assert [tuple(at) for at in scene.at[:-1]] == [stand[name] for name in names[:-1]] and change['hosts'][0] == (0, [17]) and len(change['hosts']) == 25
    told = moment(*crowd[17:], C, own='me')
    info, frame = encode_frame(scene, told, {})
    assert len(frame) == 13 * 25 + 41 and info['own'] == 23 and info['status'].startswith('24 of 24 peers alive')
    assert scene.update(moment(*crowd, own='me'))['first'] == (25, 41) and len(scene.peers) == 42            # and may come back


def test_a_peer_known_from_links_only_is_none_of_ours():
    scene, told = Scene(), moment(A, links=[('a', 'bootstrap')], own='me')
    scene.update(told)
    assert [SHOWN_STATES[s] for s in encode_frame(scene, told, {})[1][:3]] == ['alive', 'trainer', 'trainer']


def test_a_peer_that_goes_silent_keeps_its_experts():
    scene = Scene()
    scene.update(moment(A))
    told = moment(peer('a', state='silent'))
    scene.update(told)
    assert scene.hosts == [[0, 1]] and SHOWN_STATES[encode_frame(scene, told, {})[1][0]] == 'silent'


def test_what_a_frame_says():
    scene, told = Scene(), moment(A, B, rates={'ffn.0.0': 10., 'ffn.0.1': 5., 'ffn.1.0': 0.}, calls={'a': [300, 12]}, own='a')
    scene.update(told)
    info, frame = encode_frame(scene, told, {'a': 7})
    n, m = 2, 3
    assert len(frame) == 13 * n + m and info['top'] == 10. and info['own'] == 0
    assert frame[:2] == bytes([0, 0]) and frame[n:2 * n] == bytes([255, 0]) and frame[2 * n:3 * n] == bytes([7, 0]) and list(frame[3 * n:3 * n + m]) == [255, 127, 0]
    rest = frame[3 * n + m:]
    assert np.frombuffer(rest[:4], '<u2').tolist() == [123, 0] and np.frombuffer(rest[4:12], '<u4').tolist() == [9, 0] and np.frombuffer(rest[12:], '<f4').tolist() == [15., 0.]


def test_frames_and_opening_states_are_small():
    for told, most_frame in (many(64, 4, 16), 4 << 10), (many(), 32 << 10):
        view = SwarmView(told)
        whole = view._whole_scene()
        assert len(encode_frame(view._scene, told, {})[1]) < most_frame
        assert len(json.dumps({k: v for k, v in whole.items() if not isinstance(v, bytes)})) + sum(len(v) for v in whole.values() if isinstance(v, bytes)) < 300 << 10
        assert len(view.svg()) < 600 << 10
        view.close()


def test_a_view_sends_what_is_new():
    moments, sent = [moment(A, own='me', calls={'a': [1, 10]}), moment(A, B, own='me', calls={'a': [1, 14]}), moment(A, B, own='me', calls={'a': [0, 15]})], []
    view = SwarmView(lambda: moments.pop(0))
    view.send = lambda content, buffers=None: sent.append((content, buffers))
    view.tick(), view.tick()
    assert [content['kind'] for content, _ in sent] == ['scene', 'frame', 'frame'] and sent[0][0]['peers'] == [['b', '/dns4/b/tcp/1', None]]
    assert [len(buffer) for buffer in sent[0][1]] == [12, 6 * 3, 0] and sent[0][0]['first'] == (2, 2)
    assert [buffers[0][6] for _, buffers in sent[1:]] == [0, 1]  # calls begun since the last frame; the first one has nothing to count from
    json.dumps([content for content, _ in sent])
    view.close()


def test_nobody_at_all():
    view = SwarmView(moment())
    assert '0 of 0 peers alive' in repr(view) and '<svg' in view.svg() and view.still().startswith('<img')
    view.close()


@pytest.mark.parametrize('n', [1, 2, 40])
def test_places_are_in_the_circle_and_stay(n):
    ids, links, at = [f'peer{i}' for i in range(n)], [(i, (i * 3 + 1) % n) for i in range(n)], []
    place_peers(ids, links, at)
    first = list(at)
    place_peers(ids + ['new', 'newer'], links + [(0, n), (n, n + 1)], at)
    assert at[:n] == first and len(at) == n + 2 and all(x * x + y * y <= 1.001 and 0 <= turn <= 7 for x, y, turn in at)
    assert len({(round(x, 4), round(y, 4)) for x, y, _ in at}) == n + 2


def test_curves_stay_few_and_keep_both_ends():
    curve = Curve()
    for i in range(50_000): curve.add(i, -i)
    assert MOST_POINTS / 2 <= len(curve.x) <= MOST_POINTS and curve.x[0] < 500 and curve.x[-1] > 49_000 and curve.x == sorted(curve.x) and all(x == -y for x, y in zip(curve.x, curve.y))


def test_curves_as_svg():
    assert 'loss: –' in curve_svg({'loss': ([], [], 'red')}) and '<polyline' not in curve_svg({'loss': ([1], [2.], 'red')})
    svg = curve_svg({'<b>': ([1, 2, 3], [1., float('nan'), 1.], 'red')})  # a constant, a gap, and a name to escape
    assert '&lt;b&gt;' in svg and svg.count('<polyline') == 1 and 'nan' not in svg


class View(Shown):
    def __init__(self): self.ticks, self.ticker = 0, Ticker(self, every=0.01)
    def tick(self): self.ticks += 1
    def still(self): return image('<svg/>', 'a "still"')
    def __repr__(self): return 'View()'


def wait(true, timeout=10.):
    deadline = time.monotonic() + timeout
    while not true() and time.monotonic() < deadline: time.sleep(0.01)
    return true()


def test_a_ticker_ends_with_its_view():
    view = View()
    view.ticker.start()
    assert wait(lambda: view.ticks > 2)
    thread = view.ticker._thread
    del view
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_ticker_stops_starts_again_and_is_one_thread():
    view = View()
    view.ticker.start()
    first = view.ticker._thread
    view.ticker.start()
    assert view.ticker._thread is first and wait(lambda: view.ticks > 2)
    view.ticker.stop()
    ticks = view.ticks
    assert not view.ticker.running and not first.is_alive()
    view.ticker.start()
    assert wait(lambda: view.ticks > ticks)
    view.ticker.stop()


def test_a_view_that_cannot_be_drawn_says_so_once(caplog):
    view = View()
    view.tick = lambda: 1 / 0
    view.ticker.start()
    view.ticker._thread.join(10)
    assert not view.ticker.running and sum('View() cannot be drawn any more' in record.message for record in caplog.records) == 1


def test_without_a_kernel_there_is_the_still(capsys):
    view = View()
    view._ipython_display_()
    assert not view.ticker.running and view._repr_mimebundle_()[0] == {'text/plain': 'View()', 'text/html': view.still()}
    assert view.still().startswith('<img alt="a &quot;still&quot;"')


def test_in_colab_every_view_says_where_the_manager_of_widgets_is(monkeypatch):
    from types import ModuleType, SimpleNamespace
    from pathlib import Path
    from lah_nb import PeerPanel
    from lah_nb.views import live
    from synthetic import SOURCE
    output, url, sent = ModuleType('google.colab.output'), 'https://ssl.gstatic.com/manager.js', []
    output._widgets = SimpleNamespace(_installed_url=url)
    output.enable_custom_widget_manager = lambda: None
    monkeypatch.setitem(sys.modules, 'google.colab.output', output)
    monkeypatch.setattr(live, 'in_kernel', lambda: True)
    monkeypatch.setattr(live, 'display', lambda data, metadata=None, **more: sent.append((data, metadata)))
    scope, mime = {}, 'application/vnd.jupyter.widget-view+json'
    exec(SOURCE, scope)
    for view in SwarmView(scope['Source'](4, 2, 4)), PeerPanel():
        sent.clear()
        view._ipython_display_()
        drawn = [(data, about) for data, about in sent if mime in data]
        assert len(drawn) == 1 and drawn[0][0]['text/html'] and drawn[0][1] == {mime: {'colab': {'custom_widget_manager': {'url': url}}}}
        view._ticker.stop()
        view._outputs = []
        view.close()
    code = ''.join(file.read_text() for file in Path(live.__file__).parent.glob('*.py'))
    assert not [broken for broken in ('W.Accordion(', 'W.Tab(') if broken in code]  # they do not open under Colab's manager


def test_marimo_draws_the_swarm_and_shows_panels_as_stills():
    pytest.importorskip('marimo')
    from marimo._output.formatters.formatters import register_formatters
    from marimo._output.formatting import try_format
    from lah_nb import PeerPanel
    from synthetic import SOURCE
    scope = {}
    exec(SOURCE, scope)
    register_formatters()
    view, panel = SwarmView(scope['Source'](4, 2, 4)), PeerPanel()
    assert 'marimo-anywidget' in try_format(view).data and panel.still() in str(try_format(panel).data)
    view.tick()  # what a cell with a `mo.ui.refresh` does
    view.close(), panel.close()
