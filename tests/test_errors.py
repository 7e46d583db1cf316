"What people do wrong, or the world does to them: one paragraph that names cause and remedy, a place to read on, an exit code, and an end."
import ast, configparser, http.server, json, logging, os, re, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import pytest
from conftest import freeze

from lah_nb.command import main
from lah_nb.swarm import LocalPeer
from lah_nb import Swarm, SwarmError
from lah_nb.errors import HELP, LahError
from lah_nb.network import new_identity, peer_id_of
from lah_nb.network.calls import refusal

ROOT = Path(__file__).parents[1]
LAH = [sys.executable, '-c', 'import sys; from lah_nb.command.cli import main; sys.exit(main())']
NOBODY = peer_id_of(new_identity(b'n' * 32))


def anchors_used():
    "Every string that is given as `see=...`, or `see = ...` in a class, and every `{HELP}#...`"
    for path in (ROOT / 'lah_nb').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        yield from re.findall(r'\{HELP\}#([a-z-]+)', text)
        for thing in ast.walk(ast.parse(text)):
            value = thing.value if isinstance(thing, ast.keyword) and thing.arg == 'see' or isinstance(thing, ast.Assign) and getattr(thing.targets[0], 'id', None) == 'see' else None
            if value is not None: yield from (part.value for part in ast.walk(value) if isinstance(part, ast.Constant) and isinstance(part.value, str) and not _tested(value, part))


def _tested(value, part): return isinstance(value, ast.IfExp) and any(part is inner for inner in ast.walk(value.test))


def test_every_anchor_that_an_error_names_is_on_the_page_and_the_other_way_round():
    page = (ROOT / 'docs/troubleshooting.md').read_text(encoding='utf-8')
    there = re.findall(r'^\(([a-z-]+)\)=$', page, re.M)
    assert len(there) == len(set(there)) and set(there) == set(anchors_used())


def test_the_page_is_where_the_errors_say():
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    assert HELP == settings['DEFAULT']['doc_host'] + settings['DEFAULT']['doc_baseurl'] + '/troubleshooting.html'


def test_what_travels_does_not_carry_the_place():
    error = LahError('the peer is full', see='all-taken')
    assert str(error) == f'the peer is full (see {HELP}#all-taken)' and refusal(error) == {'error': ['LahError', 'the peer is full']}


@pytest.fixture(scope='module')
def addr():
    peer = LocalPeer('--experts', 'ffn.[0:2].[0:2]', '--hidden-dim', '16')
    peer.wait_ready()
    yield peer.addrs[0]
    peer.stop()


@pytest.fixture
def lah(capsys):
    "The command in this process: (exit code, what it says to people)"
    def run(*args):
        code = main([str(arg) for arg in args])
        return code, capsys.readouterr().err
    yield run
    logging.getLogger().handlers = [handler for handler in logging.getLogger().handlers if not hasattr(handler, 'of_lah')]


def one_paragraph(said: str, see: str, *words: str):
    assert said.startswith('lah-nb: ') and said.count('\n') == 1 and said.endswith(f'(see {HELP}#{see})\n') and said.count('(see ') == 1, said
    for word in words: assert word in said, said


@pytest.mark.parametrize('args, see, words', [
    (['status', '--join', 'localhost:4001'], 'address', ['dns4/localhost', '/p2p/']), (['status', '--join', '/ip4/127.0.0.1/tcp/4001'], 'address', ['lacks the /p2p/']),
    (['peer', '--listen', 'nowhere'], 'listen', ['not an address to listen at']), (['peer', '--listen', '/ip4/192.0.2.1/tcp/0'], 'listen', ['cannot listen at']),
    (['peer', '--listen', '/ip4/127.0.0.1/udp/4001/quic-v1'], 'listen', ['over TCP']), (['peer', '--identity', __file__], 'identity', ['cannot keep the identity', 'another file']),
    (['peer', '--identity', os.curdir], 'identity', ['cannot keep the identity']), (['peer', '--experts', 'ffn.[3:1]'], 'uids', ['holds no expert']),
    (['peer', '--experts', 'ffn.0', '--expert-cls', 'nonesuch'], 'expert-class', ['nonesuch', '--expert-file']), (['peer', '--experts', 'ffn.0', '--expert-file', 'missing.py'], 'expert-class', ['no Python file']),
    (['peer', '--experts', 'ffn.0', '--expert-file', str(ROOT / 'LICENSE')], 'expert-class', ['no Python file']), (['peer', '--experts', 'ffn.0', '--hidden-dim', '200000'], 'memory', ['MiB are free', '--num-experts']),
    (['peer', '--experts', 'ffn.0', '--hidden-dim', '16', '--device', 'nonesuch'], 'device', ['cannot run on the device']), (['peer', '--volunteer'], 'joining', ['--join ADDR']),
    (['peer', '--experts', 'ffn.0', '--hidden-dim', '16', '--checkpoint-dir', __file__], 'checkpoint', ['cannot be saved', '--checkpoint-dir']),
])
def test_wrong_options_of_one_computer(lah, args, see, words):
    code, said = lah(*args)
    assert code == 1
    one_paragraph(said, see, *words)


@pytest.mark.parametrize('args, see, words', [
    (['peer', '--experts', 'ffn.[0:2].[0:2]', '--num-experts', '2', '--hidden-dim', '16'], 'all-taken', ['all 4 experts']), (['train', 'digits', '--uid-prefix', 'zzz'], 'grids', ['the grids ffn', '--uid-prefix']),
    (['peer', '--volunteer', '--prefix', 'zzz'], 'grids', ['no grid of experts called']),
])
def test_wrong_options_in_a_swarm(lah, addr, tmp_path, args, see, words):
    code, said = lah(*args, '--join', addr, *(['--identity', tmp_path / 'id'] if '--volunteer' in args else []))
    assert code == 1
    one_paragraph(said, see, *words)


@pytest.mark.parametrize('args', [['peer', '--hidden-dim', '-3'], ['demo', '--grid', '0x4'], ['demo', '--report', '/nowhere/report.html'], ['peer', '--metrics', 'here'], ['train', 'digits'], [], ['nonesuch']])
def test_wrong_usage_is_told_with_the_usage(lah, capsys, args):
    with pytest.raises(SystemExit) as ended: lah(*args)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith('usage: lah-nb') and 'error:' in said


def test_no_data_and_no_way_to_get_it(lah, addr, tmp_path, monkeypatch):
    monkeypatch.setenv('LAH_DATA', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nobody is there
    code, said = lah('train', 'mnist', '--join', addr)
    said = said[said.index('lah-nb: '):]
    assert code == 1 and said.endswith(f'(see {HELP}#data)\n') and said.count('(see ') == 1 and str(tmp_path) in said and 'sha256' in said


def test_a_peer_that_cannot_start_says_why_in_a_notebook():
    with pytest.raises(SwarmError) as told: Swarm.local(1, 'ffn.[0:2]', expert_cls='nonesuch')
    assert str(told.value).startswith('the peer could not start: no class of experts') and str(told.value).count(f'{HELP}#expert-class') == 1


def test_a_swarm_that_is_closed_says_so(addr):
    swarm = Swarm.join(addr)
    swarm.close()
    with pytest.raises(SwarmError, match='#closed'): swarm.snapshot()


@pytest.fixture
def somebody(request, monkeypatch):
    "An address where something else answers than a peer of this swarm"
    where = lambda port: f'/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        if request.param == 'refuses':
            s.close()
            yield where(port)
        elif request.param == 'is mute':
            s.listen()
            yield where(port)
        elif request.param == 'is a web server':
            server = http.server.HTTPServer(('127.0.0.1', 0), type('Quiet', (http.server.BaseHTTPRequestHandler,), {'log_message': lambda *args: None}))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield where(server.server_port)
            server.shutdown(), server.server_close(), thread.join()
        elif request.param == 'is unknown': yield f'/dns4/nobody.invalid/tcp/4001/p2p/{NOBODY}'
        elif request.param == 'has another version':
            code = "import lah_nb.network.host as p; p._protocol_id = lambda protocol: f'/lah/{protocol}/99'\nimport sys; from lah_nb.command.cli import main; sys.exit(main(['peer']))"
            other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
            yield other.stdout.readline().split()[1]
            other.kill(), other.wait(), other.stdout.close()
        else:
            peer = LocalPeer()
            peer.wait_ready()
            if request.param == 'is stopped': freeze(peer.pid)
            yield f'{peer.addrs[0].partition("/p2p/")[0]}/p2p/{NOBODY}' if request.param == 'is another peer' else peer.addrs[0]
            peer.kill()


@pytest.mark.parametrize('somebody, see, words', [
    ('refuses', 'joining', 'nobody can be reached there'), ('is mute', 'joining', 'no'), ('is a web server', 'joining', 'no peer of a swarm'), ('is unknown', 'joining', 'cannot be resolved here'),
    ('has another version', 'version', 'another version'), ('is another peer', 'joining', 'not that peer'), ('is stopped', 'joining', 'no'),
], indirect=['somebody'])
def test_nobody_answers(somebody, see, words):
    start = time.monotonic()
    with pytest.raises(LahError) as told: Swarm.join(somebody, timeout=6.)
    assert time.monotonic() - start < 30
    assert re.fullmatch(rf'nobody answered at {re.escape(somebody)}: .*{words}.*\. .*', told.value.text) and told.value.see == see, told.value


@pytest.mark.skipif(not shutil.which('unshare') or subprocess.run(['unshare', '-rn', 'true'], capture_output=True).returncode != 0, reason='needs network namespaces')
@pytest.mark.parametrize('command, see, words', [(['status'], 'joining', 'nobody answered at'), (['peer', '--experts', 'ffn.0'], 'joining', 'nobody answered at'), (['peer', '--volunteer'], 'listen', 'is it on a network')])
def test_no_network_at_all(command, see, words, tmp_path):
    result = subprocess.run(['unshare', '-rn', *LAH, *command, '--join', f'/ip4/192.0.2.7/tcp/4001/p2p/{NOBODY}'], capture_output=True, text=True, timeout=110, env={**os.environ, 'XDG_DATA_HOME': str(tmp_path)})
    assert result.returncode == 1
    one_paragraph(result.stderr, see, words)


@pytest.mark.slow
def test_clocks_that_differ_by_a_year(addr):
    "Records carry the time they have left, so a peer whose clock is wrong serves, and is trained, like any other"
    code = "import time; now = time.time; time.time = lambda: now() - 365 * 86400\nimport sys; from lah_nb.command.cli import main; sys.exit(main(sys.argv[1:]))"
    late = subprocess.Popen([sys.executable, '-c', code, 'peer', '--join', addr, '--experts', 'late.[0:4]', '--hidden-dim', '16'], stdout=subprocess.PIPE, text=True)
    try:
        assert late.stdout.readline().startswith('ready ')
        result = subprocess.run([*LAH, 'train', 'digits', '--join', addr, '--uid-prefix', 'late', '--k', '2', '--steps', '20', '--json'], capture_output=True, text=True, timeout=110)
        assert result.returncode == 0, result.stderr
        data = json.loads(result.stdout.splitlines()[-1])
        assert data['experts_used'] == 4 and data['failed_calls'] == 0
    finally: late.terminate(), late.wait(20), late.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize('command, sign, code', [
    (['status', '--join', 'MUTE'], None, 130), (['peer', '--join', 'MUTE'], None, 0), (['doctor', '--join', 'MUTE'], None, 130), (['train', 'digits', '--join', 'MUTE'], None, 130),
    (['train', 'digits', '--join', 'ADDR', '--uid-prefix', 'ffn', '--log-json', '--json'], 'loss', 0), (['demo', '--report', 'REPORT', '--peers', '2', '--grid', '2x2', '--hidden-dim', '16'], 'starting', 130),
    (['peer', '--volunteer', '--join', 'ADDR', '--identity', 'ID'], 'ready', 0)])
def test_ctrl_c(command, sign, code, addr, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)), s.listen()
        names = {'MUTE': f'/ip4/127.0.0.1/tcp/{s.getsockname()[1]}/p2p/{NOBODY}', 'ADDR': addr, 'REPORT': str(tmp_path / 'report.html'), 'ID': str(tmp_path / 'id')}
        p = subprocess.Popen([*LAH, *(names.get(word, word) for word in command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            if sign is None: s.settimeout(90), s.accept()[0].close()  # it tries to join
            else:
                while sign not in (line := p.stdout.readline()): assert line, 'ended before'
            p.send_signal(signal.SIGINT)
            out, _ = p.communicate(timeout=60)
        finally:
            p.kill(), p.wait(), p.stdout.close()
    assert p.returncode == code and 'Traceback' not in out, out
