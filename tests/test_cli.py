"The command as a user runs it: processes, signals, exit codes, JSON."
import json, shlex, shutil, signal, socket, subprocess, sys, time, urllib.request
from datetime import datetime, timedelta
from pathlib import Path

import psutil, pytest
from prometheus_client.parser import text_string_to_metric_families

from lah_nb.command.cli import make_parser
from lah_nb.network.events import read_events

LAH = [sys.executable, '-c', 'import sys; from lah_nb.command.cli import main; sys.exit(main())']


def run(*args, timeout=100, **kwargs): return subprocess.run([*LAH, *args], capture_output=True, text=True, timeout=timeout, **kwargs)


@pytest.fixture
def peer():
    started = []
    def start(*args):
        p = subprocess.Popen([*LAH, 'peer', *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(p)
        line = p.stdout.readline()
        assert line.startswith('ready /ip4/127.0.0.1/tcp/'), (line, p.stderr.read() if p.poll() is not None else '')
        return p, line.split()[1]
    yield start
    for p in started:
        if p.poll() is None: p.kill()
        p.wait()
        p.stdout.close(), p.stderr.close()


@pytest.mark.slow
def test_importing_is_quick_and_light():
    code = 'import sys, time; t = time.perf_counter(); import lah_nb; t = time.perf_counter() - t; import lah_nb.command.cli; heavy = {"torch", "libp2p", "plotly", "pandas", "networkx"} & set(sys.modules); print(t, heavy); sys.exit(bool(heavy) or t > 0.1)'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize('command', [[], ['demo'], ['peer'], ['train'], ['status'], ['simulate', 'index'], ['simulate', 'training'], ['simulate', 'links']])
def test_help(command):
    result = run(*command, '--help')
    assert result.returncode == 0 and 'usage: lah-nb' in result.stdout
    if command: assert '--json' in result.stdout


@pytest.mark.parametrize('args, words', [
    (['status', '--join', 'localhost:4001'], '/dns4/localhost/tcp/4001'), (['peer', '--experts', 'ffn.[3:1]'], 'holds no expert'), (['peer', '--experts', 'ffn.0', '--expert-cls', 'nonesuch'], 'nonesuch'),
    (['peer', '--listen', 'nowhere'], 'not an address to listen at'), (['peer', '--experts', 'ffn.0', '--expert-file', 'missing.py'], 'no Python file')])
def test_wrong_use_is_one_paragraph(args, words):
    result = run(*args)
    assert result.returncode == 1 and result.stderr.startswith('lah-nb: ') and words in result.stderr and 'Traceback' not in result.stderr and result.stderr.count('\n') == 1


def test_a_simulation_is_the_same_again():
    "In other processes, whose hashes of strings differ"
    told = [json.loads(run('simulate', 'index', '--peers', '24', '--seed', '3', '--json').stdout.splitlines()[-1]) for _ in range(2)]
    for one in told: assert min(one.pop(name) for name in ('seconds', 'cpu_seconds', 'memory_mib')) > 0
    assert told[0] == told[1] and told[0]['found'] == 1.


def test_simulate_training_prints_what_training_through_weather_gave_and_the_same_again():
    command = 'simulate', 'training', '--peers', '4', '--steps', '12', '--in-flight', '4', '--delay', '100', '--drop', '0.1', '--json'
    told, again = (json.loads(run(*command).stdout.splitlines()[-1]) for _ in range(2))
    assert min(one.pop('took') for one in (told, again)) > 0
    assert told == again
    assert told['samples'] == 12 * 32 and told['served'] == 1 and told['in_flight'] == 4
    assert 0.3 < told['seconds'] < 30 and 0 < told['accuracy'] < 1 and len(told['loss']) == len(told['at'])


def test_simulate_links_prints_throughputs_and_the_same_again():
    command = 'simulate', 'links', '--peers', '2', '--in-flight', '1', '--delay', '50', '--up', '100', '--down', '100', '--codec', 'float16', '--json'
    told, again = (json.loads(run(*command).stdout.splitlines()[-1]) for _ in range(2))
    assert min(one.pop('took') for one in (told, again)) > 0
    assert told == again
    assert told['codec'] == 'float16' and told['failed_calls'] == 0
    assert min(told[name] for name in ('dmoe', 'model_parallel', 'pipelined', 'streamed')) > 0 and told['version'] and told['machine']


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_a_peer_leaves_in_order(peer, tmp_path, how):
    bootstrap, addr = peer('--identity', str(tmp_path / 'id.key'))
    server, _ = peer('--join', addr, '--experts', 'ffn.[0:2].[0:4]', '--num-experts', '5', '--hidden-dim', '16', '--checkpoint-dir', str(tmp_path / 'saved'), '--record', str(tmp_path / 'log'), '--json')
    status = run('status', '--join', addr, '--json')
    data = json.loads(status.stdout.splitlines()[-1])
    assert data['experts'] == 5 and len(data['peers']) == 2 and {'peer_id', 'addrs', 'experts', 'updates', 'load'} <= data['peers'][0].keys()
    server.send_signal(how)
    out, err = server.communicate(timeout=20)
    assert server.returncode == 0, err
    told, log = json.loads(out.splitlines()[-1]), read_events(tmp_path / 'log')
    assert [(e.kind, e.peer) for e in log.events if e.kind != 'call'] == [('join', told['peer_id']), ('leave', told['peer_id'])] and log.whole
    assert 'dht.store' in {e.what for e in log.events if e.kind == 'call' and e.peer == told['peer_id'] and e.how == 'answered'}  # told, and withdrawn
    assert told['experts'] == 5 and len(list((tmp_path / 'saved').glob('*.safetensors'))) == 5
    assert json.loads(run('status', '--join', addr, '--json').stdout.splitlines()[-1])['experts'] == 0  # withdrawn, not expired
    bootstrap.send_signal(how)
    bootstrap.wait(20)
    assert bootstrap.returncode == 0


@pytest.mark.nightly
def test_weather_lies_on_a_peer_and_on_a_trainer(peer):
    _, addr = peer('--experts', 'ffn.[0:2].[0:2]', '--hidden-dim', '16', '--delay', '100')
    train = lambda *weather: json.loads(run('train', 'digits', '--join', addr, '--steps', '12', '--in-flight', '1', '--json', *weather).stdout.splitlines()[-1])
    far, farther = train(), train('--delay', '100', '--drop', '0.01')
    assert far['seconds'] > 12 * 0.2 and far['delay_ms'] == 0  # four delays a batch, in the mean
    assert farther['seconds'] > far['seconds'] and (farther['delay_ms'], farther['drop'], farther['in_flight']) == (100, 0.01, 1)


@pytest.mark.slow
def test_two_peers_share_a_grid_and_a_trainer_trains_on_it(peer, tmp_path):
    _, addr = peer('--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16')
    peer('--join', addr, '--experts', 'ffn.[0:2].[0:4]', '--num-experts', '4', '--hidden-dim', '16')
    result = run('train', 'digits', '--join', addr, '--steps', '150', '--save', str(tmp_path / 'model.safetensors'), '--json', timeout=200)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout.splitlines()[-1])
    assert data['experts'] == 8 and data['experts_used'] == 8 and data['steps'] == 150 and data['test_accuracy'] > 0.8
    assert (tmp_path / 'model.safetensors').stat().st_size > 1000 and data['save']


@pytest.mark.slow
def test_demo(tmp_path):
    result = run('demo', '--peers', '3', '--grid', '3x4', '--hidden-dim', '32', '--steps', '200', '--kill-at', '100', '--json', cwd=tmp_path, timeout=250)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout.splitlines()[-1])
    assert {'data', 'peers', 'experts', 'steps', 'seconds', 'samples_per_s', 'train_loss', 'test_accuracy', 'killed_peers', 'failed_calls', 'experts_used'} <= data.keys()
    assert data['killed_peers'] == 1 and data['steps'] == 200 and data['test_accuracy'] > 0.85
    page = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert 'was killed' in page and page.count('Plotly.newPlot') >= 4 and '<script src' not in page


@pytest.mark.slow
def test_a_server_with_64_experts_is_one_process_under_450_mib(peer):
    process, _ = peer('--experts', 'ffn.[0:8].[0:8]', '--hidden-dim', '64')
    handle = psutil.Process(process.pid)
    assert handle.children(recursive=True) == [] and handle.memory_info().rss < 450 << 20


def test_version_and_completion():
    assert run('--version').stdout.startswith('lah-nb ')
    for shell in ('bash', 'zsh', 'fish'):
        script = run('--completion', shell)
        assert script.returncode == 0 and 'lah-nb' in script.stdout and '--checkpoint-dir' in script.stdout or 'checkpoint-dir' in script.stdout


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_bash_completes(tmp_path):
    (tmp_path / 'lah-nb.bash').write_text(run('--completion', 'bash').stdout)
    ask = 'source {}; COMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=(); $(complete -p lah-nb | sed "s/.*-F \\([^ ]*\\).*/\\1/"); printf "%s\\n" "${{COMPREPLY[@]}}"'
    complete = lambda *words: subprocess.run(['bash', '-c', ask.format(tmp_path / 'lah-nb.bash', ' '.join(words), len(words) - 1)], capture_output=True, text=True, timeout=30).stdout.split()
    assert complete('lah-nb', 'st') == ['status'] and complete('lah-nb', 'peer', '--metr') == ['--metrics'] and complete('lah-nb', 'train', 'wiki') == ['wikitext2']


@pytest.mark.slow
def test_numbers_for_prometheus_and_lines_of_json(peer, tmp_path):
    process, addr = peer('--experts', 'ffn.[0:2].[0:2]', '--hidden-dim', '16', '--metrics', '0', '--log-json')
    lines, until_url = [], None
    while until_url is None:
        lines.append(json.loads(process.stderr.readline()))
        until_url = lines[-1].get('url')
    def scrape(url):
        with urllib.request.urlopen(url, timeout=10) as answer: return {sample.name + ''.join(sorted(sample.labels.values())): sample.value for family in text_string_to_metric_families(answer.read().decode()) for sample in family.samples}
    before = scrape(until_url)
    assert before['lah_experts'] == 4 and before['lah_rows_totalforward'] == 0
    trainer = subprocess.Popen([*LAH, 'train', 'digits', '--join', addr, '--k', '2', '--steps', '200', '--log-json', '--json', '--metrics', '127.0.0.1:0', '--tensorboard', str(tmp_path / 'runs')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told, seen = [json.loads(trainer.stderr.readline())], {}
        while trainer.poll() is None and not seen.get('lah_train_steps_total'): seen = scrape(told[0]['url'])
        out, err = trainer.communicate(timeout=100)
    finally:
        trainer.kill(), trainer.wait(), trainer.stdout.close(), trainer.stderr.close()
    assert trainer.returncode == 0, err
    assert seen['lah_train_steps_total'] > 0 and seen['lah_train_batches_in_flight'] >= 0
    told += map(json.loads, err.splitlines())
    assert all({'time', 'level', 'logger', 'message'} <= line.keys() for line in told) and all(datetime.fromisoformat(line['time']).utcoffset() == timedelta(0) for line in told)
    assert any(line.get('step') and line['loss'] > 0 for line in told) and any('result' in line for line in told)
    after = scrape(until_url)
    assert after['lah_rows_totalforward'] > 0 and after['lah_updates_total'] > 0 and after['lah_bytes_totalreceived'] > before['lah_bytes_totalreceived'] and after['lah_requests_totalcall.forward'] > 0
    assert after['lah_uptime_seconds'] > before['lah_uptime_seconds']
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    lines += map(json.loads, process.stderr.read().splitlines())
    assert 'ready' in [line['message'] for line in lines]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    written = EventAccumulator(str(tmp_path / 'runs')).Reload()
    result = json.loads(out.splitlines()[-1])
    assert len(written.Scalars('loss')) == 200 and written.Scalars('test/accuracy')[-1].step == 200 and abs(written.Scalars('test/accuracy')[-1].value - result['test_accuracy']) < 1e-3


def test_no_metrics_where_another_program_listens():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)), s.listen()
        result = run('peer', '--metrics', str(s.getsockname()[1]))
    assert result.returncode == 1 and result.stderr.startswith('lah-nb: no metrics at') and result.stderr.count('\n') == 1 and '#listen' in result.stderr


def test_tensorboard_that_is_missing_is_named_with_the_way_to_get_it():
    code = "import sys; sys.modules['tensorboard'] = None\nfrom lah_nb.command.cli import main; sys.exit(main(['train', 'digits', '--join', '/ip4/127.0.0.1/tcp/1/p2p/12D3KooWBHvsSSKHeragACma3HUodK5FcPUpXccxFNYVsyD6fSCg', '--tensorboard', 'runs']))"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and result.stderr.startswith('lah-nb: TensorBoard is not installed: pip install') and '#tensorboard' in result.stderr and result.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_doctor_who_finds_something_bad_says_so_with_the_exit_code(peer):
    process, addr = peer()
    process.kill()
    process.wait()
    result = run('doctor', '--join', addr, '--json')
    assert result.returncode == 1 and json.loads(result.stdout.splitlines()[-1])['checks'][-1]['state'] == 'bad'


@pytest.mark.slow
def test_doctor_and_watch(peer):
    _, addr = peer('--experts', 'ffn.[0:2]', '--hidden-dim', '16')
    said = json.loads(run('doctor', '--join', addr, '--json').stdout.splitlines()[-1])
    assert said['good'] and '1 of 1 peers answer, 2 experts' in said['checks'][-1]['found']
    watch = subprocess.Popen([*LAH, 'status', '--join', addr, '--watch'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(10)
    watch.send_signal(signal.SIGINT)
    out, _ = watch.communicate(timeout=20)
    assert watch.returncode == 0 and '2 experts on 1 peers' in out and 'Traceback' not in out, out


def test_the_commands_of_the_compose_file_are_ours(tmp_path):
    yaml = pytest.importorskip('yaml')
    text = (Path(__file__).parents[1] / 'compose.yaml').read_text()
    services = yaml.safe_load(text.replace('/data/', f'{tmp_path}/'))['services']
    for service in services.values():
        [script] = service['command']
        calls = [shlex.split(line.split('lah-nb ')[1].split(' > ')[0].split('|')[0]) for line in script.replace('\\\n', ' ').splitlines() if 'lah-nb ' in line]
        for call in calls: make_parser().parse_args(call)
        assert calls
