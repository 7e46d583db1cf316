"Pictures and the report: in a fresh process, with odd names, with little data, and in a browser where there is one"
import re, shutil, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest

from lah_nb.mixture import Span
from lah_nb.views.figures import (cost_of_event, grid_layout, load_figure, report, summarize, swarm_figure, swarm_graph, swarm_layout, time_figure,
                                  training_figure)
from lah_nb.views.study import beam_figure, hosting_figure, latency_figure, load_over_time_figure, timeline_figure


def history(n=40, **columns):
    steps = np.arange(1, n + 1)
    return pd.DataFrame(dict(step=steps, loss=1 / steps, seconds=0.1 * steps, samples=32 * steps, samples_per_s=320.0, staleness=1, failed_calls=0) | columns)


def snapshot(n=3, experts=8):
    return dict(peers=[dict(peer_id=f'peer-{i}', addrs=[], experts=[f'ffn.{i}.{j}' for j in range(experts)], updates=i, load=0.1, alive=True) for i in range(n)], experts=n * experts, links=[['peer-0', 'peer-1']])


def test_no_torch():
    code = ('import sys\nfor name in ("torch", "libp2p", "trio", "sklearn"): sys.modules[name] = None  # an import of them fails\n'
            'from lah_nb.views.figures import *\nfrom lah_nb.views.study import *\nimport lah_nb.mixture.trace, lah_nb.mixture.stats\nhosting_figure(dict(peers=[])), timeline_figure([]), latency_figure({}), load_over_time_figure([])')
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('n', [1, 2, 3, 500])
def test_histories_of_any_length(n, tmp_path):
    h = history(n, test_accuracy=np.where(np.arange(n) % 2, np.nan, 0.5))
    assert len(training_figure(h).data) == 4
    assert cost_of_event(h, 1)['failed_calls'] == 0
    assert report(tmp_path / 'r.html', history=h, events=[(n, 'x')]).exists()


def test_nothing_at_all(tmp_path):
    page = report(tmp_path / 'r.html').read_text()
    assert '<h1>' in page and 'plotly' not in page and len(page) < 10_000
    assert report(tmp_path / 'r.html', history=pd.DataFrame(), snapshot={'peers': []}, served={}).exists()
    assert [p.name for p in tmp_path.iterdir()] == ['r.html']


def test_names_are_escaped(tmp_path):
    evil = '<script>alert(1)</script>'
    snap = snapshot()
    snap['peers'][0]['peer_id'] = evil
    page = report(tmp_path / 'r.html', title=evil, result=dict(data=evil, peers=1, experts=1, steps=1, seconds=1.0), history=history(), snapshot=snap, served={f'{evil}.1': 3},
                  spent={evil: 1.0}, events=[(3, evil)]).read_text()
    assert evil not in page


def test_the_report_loads_nothing(tmp_path):
    page = report(tmp_path / 'r.html', history=history(), snapshot=snapshot(), served={'ffn.0.1': 5}, spent={'a': 1.0}).read_text()
    assert page.count('class="plotly-graph-div"') == 4 and len(page) < 6_000_000
    assert not re.search(r'<(script|img|iframe)[^>]+src\s*=\s*"?http|<link|@import', page)


def test_cost_of_an_event():
    steps = np.arange(1, 101)
    seconds = np.where(steps <= 50, 0.1 * steps, 5 + 3 + 0.2 * (steps - 50))
    cost = cost_of_event(history(100, seconds=seconds, failed_calls=np.where(steps > 50, 7, 0)), 50)
    assert cost['speed_before'] == pytest.approx(320, rel=0.01) and cost['speed_after'] == pytest.approx(160, rel=0.05)
    assert cost['longest_gap'] == pytest.approx(3.2) and cost['failed_calls'] == 7


def test_words_for_text_and_pictures():
    words = summarize(dict(data='wikitext2', peers=4, experts=32, steps=10, seconds=1.0, samples_per_s=9000, perplexity=201.5, failed_calls=0))
    assert 'tokens per second' in words[0] and '201.5' in words[1] and words[2].startswith('0 calls')
    assert summarize({}) == []


@pytest.mark.parametrize('shape', [(5,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
def test_every_cell_has_its_own_place(shape):
    cells = [tuple(c) for c in np.ndindex(*shape)]
    assert len({grid_layout(shape, c) for c in cells}) == len(cells)
    z = np.array(load_figure({'ffn.' + '.'.join(map(str, c)): i for i, c in enumerate(cells)}).data[0].z, dtype=float)
    assert sorted(z[~np.isnan(z)]) == list(range(len(cells)))


def test_grids_that_cannot_be():
    with pytest.raises(ValueError, match='1 to 4'): grid_layout((1,) * 5, (0,) * 5)


def test_layers_are_grids_of_their_own():
    served = {f'lm.{layer}.{i}.{j}': 1 for layer in range(2) for i in range(4) for j in range(4)}
    assert [a.text for a in load_figure(served, dims=2).layout.annotations] == ['lm.0 (16 experts)', 'lm.1 (16 experts)']


def test_an_expert_with_two_hosts_lies_between_them():
    snap = snapshot(2, 1)
    snap['peers'][1]['experts'] = ['ffn.0.0']
    at = swarm_layout(swarm_graph(snap))
    assert np.linalg.norm(at['ffn.0.0'] - (at['peer-0'] + at['peer-1']) / 2) < np.linalg.norm(at['peer-0'] - at['peer-1'])
    assert swarm_figure(snap) and swarm_figure(dict(peers=[])) and swarm_figure(snapshot(1, 0))


def test_time_of_several_runs():
    assert len(time_figure({'a': dict(x=1.0), 'b': dict(x=2.0, y=3.0)}).data) == 2 and len(time_figure({}).data) == 0


def large(peers=500, experts=5000):
    rng, uids = np.random.default_rng(0), [f'ffn.{i}.{j}' for i in range(50) for j in range(100)][:experts]
    of = [[uid for uid, home in zip(uids, rng.integers(peers, size=experts)) if home == n] + uids[n::peers][:2] for n in range(peers)]
    ids = [f'12D3KooW{n:044d}' for n in range(peers)]
    return dict(peers=[dict(peer_id=id, addrs=[], experts=sorted(set(own)), updates=n, load=1.0 * n, alive=n % 20 > 0) for n, (id, own) in enumerate(zip(ids, of))], experts=experts,
                links=[(ids[a], ids[b]) for a in range(peers) for b in rng.choice(peers, min(peers, 40), replace=False)], served={uid: int(n) for uid, n in zip(uids, rng.integers(10000, size=experts))})


def moments(snapshot, n):
    return [dict(t=100.0 + i, served={uid: i * (1 + k % 7) for k, uid in enumerate(snapshot['served'])}, peers={peer['peer_id']: peer['load'] for peer in snapshot['peers']}) for i in range(n)]


def calls(n, peers, at=1000.0):
    return [Span(f'12D3KooW{i % peers:044d}', ('forward', 'backward', 'forward, lost')[i % 3], at + i, at + i + 1.5, '3 experts, 8 rows', 0.2, 0.5) for i in range(n)]


def test_large_swarms_are_drawn_soon_and_small():
    swarm = large()
    latencies = {peer['peer_id']: dict(forward=[0.01] * 100, backward=[0.5, 0.02] * 50) for peer in swarm['peers']}
    history = moments(swarm, 300)
    for draw in (lambda: swarm_figure(swarm), lambda: hosting_figure(swarm), lambda: load_figure(swarm['served']), lambda: latency_figure(latencies), lambda: load_over_time_figure(history), lambda: timeline_figure(calls(5000, 500))):
        start = time.process_time()
        fig = draw()
        assert time.process_time() - start < 6 and len(fig.to_json()) < 1_500_000  # seconds of this machine at its slowest; about 0.3 are usual


def test_every_expert_and_peer_has_its_place_in_a_large_swarm():
    g = swarm_graph(large(64, 256))
    at = swarm_layout(g)
    assert at.keys() == set(g) and all(np.isfinite(xy).all() for xy in at.values())
    assert all(np.linalg.norm(at[n]) > 1.05 for n, d in g.nodes(data=True) if d['kind'] == 'expert' and g.degree(n) == 1)


@pytest.mark.parametrize('n', [0, 1, 2])
def test_little_to_draw(n):
    swarm = large(n, 3 * n)
    assert hosting_figure(swarm) and load_over_time_figure(moments(swarm, n)) and timeline_figure(calls(n, 1)) and load_figure(swarm['served'])
    assert latency_figure({peer['peer_id']: dict(forward=[0.001] * n, backward=[]) for peer in swarm['peers']})
    assert load_over_time_figure([dict(t=0, served={}, peers={})] * n)


def test_a_timeline_keeps_times_apart_and_inside():
    fig = timeline_figure([Span('trainer', 'forward', 5.0, 6.0), Span('trainer', 'choose <b>', 5.1, 5.2), Span('p', 'forward', 5.2, 5.8, 'x', 0.1, 0.3), Span('p', 'backward, lost', 5.5, 7.0, '<script>')])
    bars = {trace.name: trace for trace in fig.data}
    assert set(bars) == {'trainer', 'forward call', 'lost call', 'queued at the peer', 'computed by the peer'}
    assert bars['trainer'].y == (0, 1) and bars['forward call'].y != bars['lost call'].y  # what overlaps lies in lanes
    queued, computed = bars['queued at the peer'], bars['computed by the peer']
    assert queued.base[0] == pytest.approx(300) and computed.base[0] == pytest.approx(400) and computed.x[0] == pytest.approx(300)
    assert '<script>' not in fig.to_json().replace('\\u003c', '<') and 'choose &lt;b&gt;' in bars['trainer'].text


def test_replicas_are_seen():
    swarm = snapshot(3, 2)
    swarm['peers'][1]['experts'] += ['ffn.0.0']
    swarm['peers'][2].update(experts=['ffn.0.0', 'ffn.2.10', 'ffn.2.9'], alive=False)
    fig = hosting_figure(swarm)
    assert [trace.name for trace in fig.data] == ['one host (5 experts)', 'three or more (1 experts)']
    assert fig.layout.xaxis.ticktext == ('ffn.0.0', 'ffn.0.1', 'ffn.1.0', 'ffn.1.1', 'ffn.2.9', 'ffn.2.10') and 'peer-2 (silent)' in fig.layout.yaxis.ticktext


@pytest.mark.parametrize('grid', [(7,), (3, 4), (2, 3, 4), (256, 2, 2, 2)])
def test_a_search_in_grids_of_any_dimension(grid):
    rng, levels, kept = np.random.default_rng(0), [], ['ffn']
    for size in grid:
        level = [dict(prefix=f'{prefix}.{i}', score=float(rng.normal()), fate=('kept', 'dropped', 'dead')[min(i, 2)] if n < 4 else 'dropped') for n, prefix in enumerate(kept) for i in range(size)]
        levels.append(level)
        kept = [c['prefix'] for c in level if c['fate'] == 'kept']
    fig = beam_figure(dict(uid_prefix='ffn', grid=list(grid), k=4, levels=levels, experts=[dict(uid=uid, score=1.0, weight=1 / len(kept)) for uid in kept]))
    assert len(fig.layout.xaxis.ticktext) == 1 + len(grid) and len(fig.to_json()) < 200_000
    assert beam_figure(dict(uid_prefix='ffn', grid=list(grid), k=4, levels=[[] for _ in grid], experts=[]))


def test_load_falls_to_nothing_when_an_expert_starts_again():
    history = [dict(t=t, served=served, peers={'a': 1.0}) for t, served in ((0, {'f.0': 100}), (2, {'f.0': 300}), (4, {'f.0': 20, 'f.1': 8}), (6, {'f.0': 40, 'f.1': 18}))]
    z = np.array(load_over_time_figure(history).data[-1].z, dtype=float)
    assert z[0].tolist() == [100, 0, 10] and np.isnan(z[1, :2]).all() and z[1, 2] == 5


@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium')
def test_the_report_in_a_browser(tmp_path):
    path = report(tmp_path / 'r.html', history=history(), snapshot=snapshot(), served={'ffn.0.1': 5, 'ffn.1.1': 4}, spent={'a': 1.0})
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
    dom = subprocess.run(['chromium', *flags, f'--user-data-dir={tmp_path}/profile', '--virtual-time-budget=5000', '--dump-dom', path.as_uri()], capture_output=True, text=True, timeout=90).stdout
    assert dom.count('class="main-svg"') >= 4 and dom.count('js-plotly-plot') >= 4
