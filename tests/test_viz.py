"Pictures and the report: in a fresh process, with odd names, with little data, and in a browser where there is one"
import re, shutil, subprocess, sys

import numpy as np
import pandas as pd
import pytest

from lah_nb.viz import cost_of_event, grid_layout, load_figure, report, summarize, swarm_figure, swarm_graph, swarm_layout, time_figure, training_figure


def history(n=40, **columns):
    steps = np.arange(1, n + 1)
    return pd.DataFrame(dict(step=steps, loss=1 / steps, seconds=0.1 * steps, samples=32 * steps, samples_per_s=320.0, staleness=1, failed_calls=0) | columns)


def snapshot(n=3, experts=8):
    return dict(peers=[dict(peer_id=f'peer-{i}', addrs=[], experts=[f'ffn.{i}.{j}' for j in range(experts)], updates=i, load=0.1, alive=True) for i in range(n)], experts=n * experts, links=[['peer-0', 'peer-1']])


def test_no_torch():
    code = 'import sys, lah_nb.viz; print(*sorted({"torch", "libp2p", "trio", "sklearn"} & sys.modules.keys()))'
    assert subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.strip() == ''


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


@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium')
def test_the_report_in_a_browser(tmp_path):
    path = report(tmp_path / 'r.html', history=history(), snapshot=snapshot(), served={'ffn.0.1': 5, 'ffn.1.1': 4}, spent={'a': 1.0})
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
    dom = subprocess.run(['chromium', *flags, f'--user-data-dir={tmp_path}/profile', '--virtual-time-budget=5000', '--dump-dom', path.as_uri()], capture_output=True, text=True, timeout=90).stdout
    assert dom.count('class="main-svg"') >= 4 and dom.count('js-plotly-plot') >= 4
