"Every test leaves the machine as it found it: no thread, no process, no file descriptor to a dead swarm."
import atexit, os, shutil, signal, tempfile, threading, time

import psutil, pytest, torch

from lah_nb.swarm import forking

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # where these tests run in the background, Ctrl-C is ignored, and their children would inherit that
os.environ['XDG_DATA_HOME'] = tempfile.mkdtemp(prefix='lah-tests-')  # where volunteers keep their identities
atexit.register(shutil.rmtree, os.environ['XDG_DATA_HOME'], ignore_errors=True)


def ours():
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    if forking._shared: children.discard(forking._shared._process.pid)  # it ends with this process; what it has forked counts
    return {t for t in threading.enumerate() if t.name.startswith('lah-')}, children


def freeze(pid):
    "SIGSTOP, and wait until it has come into effect"
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline: time.sleep(0.01)


def until(condition, timeout=60.):
    "What `condition` says when it says yes; it has `timeout` seconds for that"
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture(autouse=True)
def no_leaks(request):
    "Fails a test that leaves threads or processes behind; what a module's or session's fixture owns was there before"
    threads, processes = ours()
    yield
    deadline = time.monotonic() + 5  # a thread that was told to end may be about to
    while time.monotonic() < deadline:
        left, children = ours()
        left, children = left - threads, children - processes
        if not left and not children: return
        time.sleep(0.05)
    assert not left, f'threads left behind: {left}'
    assert not children, f'processes left behind: {[psutil.Process(pid).cmdline() for pid in children if psutil.pid_exists(pid)]}'


@pytest.fixture(scope='module')
def swarm():
    "Four peers with 64 small experts, shared by the tests of a module"
    from lah_nb import Swarm
    with Swarm.local(peers=4, experts='ffn.[0:8].[0:8]', hidden_dim=16) as swarm: yield swarm
