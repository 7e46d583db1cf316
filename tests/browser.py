"A throw-away JupyterLab and a headless Chromium that refuses, and notes, whatever would leave this machine."
import contextlib, json, os, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
LOCAL = 'http://127.0.0.1', 'ws://127.0.0.1', 'data:', 'blob:', 'file:', 'about:'
PANEL = 'jupyterapp.shell.currentWidget'


def find_chromium():
    return next((path for name in ('chromium', 'chromium-browser', 'google-chrome') if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser(width=1400, height=1000, **options):
    with sync_playwright() as p, tempfile.TemporaryDirectory() as profile:
        context = p.chromium.launch_persistent_context(profile, executable_path=find_chromium(), headless=True, args=ARGS, viewport=dict(width=width, height=height), **options)
        context.left = []  # requests that would have left the machine
        def gate(route):
            if route.request.url.startswith(LOCAL): return route.continue_()
            context.left.append(route.request.url)
            route.abort()
        context.route('**/*', gate)
        try: yield context
        finally: context.close()


@contextlib.contextmanager
def served(command, timeout=90, **env):
    "Runs a Jupyter server as a Python module, with folders of its own; yields its address"
    with tempfile.TemporaryDirectory(prefix='jupyter-') as tmp, open(f'{tmp}/log', 'w') as log, socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        s.close()
        env = {**os.environ, 'JUPYTER_CONFIG_DIR': f'{tmp}/config', 'JUPYTER_DATA_DIR': f'{tmp}/data', 'JUPYTER_RUNTIME_DIR': f'{tmp}/run', 'IPYTHONDIR': f'{tmp}/ipython', 'JUPYTER_PLATFORM_DIRS': '1',
               'NO_PROXY': '127.0.0.1,localhost', 'OMP_NUM_THREADS': '1', **env}
        server = subprocess.Popen([sys.executable, '-m', *command, '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}'], stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + timeout
            while True:
                try:
                    opener.open(f'http://127.0.0.1:{port}/api/status', timeout=2).read()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, Path(tmp, 'log').read_text()[-3000:]
                    time.sleep(0.2)
            yield f'http://127.0.0.1:{port}'
        finally:
            server.terminate()
            try: server.wait(15)
            except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextlib.contextmanager
def jupyterlab(folder, theme=None, timeout=90, **env):
    "A server of the notebooks in `folder`; yields its address"
    with tempfile.TemporaryDirectory(prefix='lab-') as tmp:
        def setting(plugin, **values):
            path = Path(tmp, 'settings', *plugin.split(':')).with_suffix('.jupyterlab-settings')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        setting('@jupyterlab/notebook-extension:tracker', windowingMode='none')
        setting('@jupyterlab/apputils-extension:notification', fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)
        if theme: setting('@jupyterlab/apputils-extension:themes', theme=theme)
        env |= {'JUPYTERLAB_SETTINGS_DIR': f'{tmp}/settings', 'JUPYTERLAB_WORKSPACES_DIR': f'{tmp}/ws'}
        command = ['jupyterlab', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.disable_check_xsrf=True', f'--ServerApp.root_dir={os.path.abspath(folder)}', '--LabApp.expose_app_in_browser=True',
                   '--LabApp.news_url=', '--LabApp.extension_manager=readonly', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--ServerApp.terminals_enabled=False', '--LanguageServerManager.autodetect=False']
        with served(command, timeout, **env) as url: yield url


class Notebook:
    "One notebook in a JupyterLab page, driven by the numbers of its cells"
    def __init__(self, context, url, name):
        self.page, self.errors, self.received = context.new_page(), [], []  # `received`: what the server has sent through web sockets
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.on('websocket', lambda socket: socket.on('framereceived', lambda data: self.received.append(data)))
        self.page.goto(f'{url}/lab/tree/{name}?reset')
        self.page.wait_for_selector('.jp-NotebookPanel-notebook .jp-Cell', timeout=90_000)
        self.page.evaluate(f'async () => {{ await {PANEL}.context.ready; await {PANEL}.sessionContext.ready; await {PANEL}.sessionContext.session.kernel.info }}')

    def choose(self, i): self.page.evaluate(f'() => {{ const n = {PANEL}; n.content.deselectAll(); n.content.activeCellIndex = {i} }}')

    def start(self, i):
        self.choose(i)
        self.page.evaluate("() => { window.running = jupyterapp.commands.execute('notebook:run-cell'); return null }")

    def run(self, i):
        self.start(i)
        self.page.evaluate('async () => { await window.running }')
        return self.text(i)

    def cell(self, i): return self.page.locator('.jp-Cell').nth(i)
    def count(self): return self.page.evaluate(f'{PANEL}.content.model.cells.length')
    def outputs(self, i): return self.page.evaluate(f'i => {PANEL}.content.model.cells.get(i).toJSON().outputs || []', i)
    def text(self, i): return ''.join(''.join(o.get('text', o.get('traceback', o.get('data', {}).get('text/plain', '')))) for o in self.outputs(i))

    def wait_text(self, i, wanted, timeout=60):
        deadline = time.monotonic() + timeout
        while wanted not in self.text(i):
            assert time.monotonic() < deadline, f'cell {i} says {self.text(i)[-2000:]!r}'
            time.sleep(0.1)

    def interrupt(self): self.page.evaluate(f'async () => {{ await {PANEL}.sessionContext.session.kernel.interrupt() }}')
    def restart(self): self.page.evaluate(f'async () => {{ await {PANEL}.sessionContext.restartKernel() }}')
    def save(self): self.page.evaluate(f'async () => {{ await {PANEL}.context.save() }}')

    def close(self):
        self.page.evaluate(f'async () => {{ await {PANEL}.sessionContext.shutdown() }}')
        self.page.close()


def write_notebook(path, *cells):
    "A notebook of code cells"
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path)
