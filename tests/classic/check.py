"Opens a notebook with live views in the classic notebook, watches them move, and says with which versions"
import importlib.metadata, sys, tempfile, time

from playwright.sync_api import TimeoutError

from browser import browser, served, write_notebook
from synthetic import SOURCE

TRAINER = '''
import sys, time
from types import SimpleNamespace
class Trainer:
    "What a `TrainingView` asks of a trainer, without torch"
    def __init__(self): self.optimizer, self.in_flight, self.flying, self.error, self.state, self.begun = SimpleNamespace(param_groups=[{'initial_lr': 1e-3}]), 4, 4, None, 'training', time.monotonic()
    @property
    def step(self): return int(20 * (time.monotonic() - self.begun))
    def rows(self, start): return [dict(step=i + 1, loss=1 / (i + 1), samples_per_s=640., staleness=3, failed_calls=0) for i in range(start, self.step)]
    def tests(self, name): return [(i, 1 - 1 / (i + 2)) for i in range(0, self.step, 20)] if name == 'accuracy' else []
    def pause(self): self.state = 'paused'
    def resume(self): self.state = 'training'
'''
CELLS = [SOURCE + 'source = Source(16, 4, 8)\nview = SwarmView(source)', 'view', TRAINER + 'from lah_nb import TrainingView\nTrainingView(Trainer())', 'from lah_nb import PeerPanel\nPeerPanel()',
         'from lah_nb import hosting_figure, swarm_figure\nswarm_figure(source())', 'hosting_figure(source())',
         "assert not {'torch', 'libp2p', 'trio'} & set(sys.modules)\nprint('no torch')", "view.close()\nprint('closed')"]


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(f'{folder}/a.ipynb', *CELLS)
        with served(['notebook', f'--notebook-dir={folder}', '--NotebookApp.token=', '--NotebookApp.port_retries=0', '--NotebookApp.disable_check_xsrf=True', '--NotebookApp.terminals_enabled=False']) as url, browser(1200, 1600) as context:
            page, errors = context.new_page(), []
            page.on('pageerror', lambda error: errors.append(str(error)))
            page.goto(f'{url}/notebooks/a.ipynb')
            page.wait_for_function("window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel && Jupyter.notebook.kernel.is_connected()", timeout=60_000)
            def run(i): page.evaluate(f'Jupyter.notebook.execute_cells([{i}])')
            def text(i): return page.evaluate(f"Jupyter.notebook.get_cell({i}).output_area.outputs.map(o => [o.text, o.evalue, (o.data || {{}})['text/plain']].filter(Boolean).join('')).join('')")
            def wait(script, seconds=60):
                try: page.wait_for_function(script, timeout=1000 * seconds)
                except TimeoutError: raise SystemExit(f'{script}: never\n' + '\n'.join(f'{i}: {text(i)}' for i in range(len(CELLS))) + f'\n{errors}')
            page.wait_for_timeout(3000)  # ipywidgets 7 asks a kernel for the widgets that are there, and mixes them up with those of a cell that runs meanwhile
            for i in range(7):
                run(i)
                wait(f"Number.isInteger(Jupyter.notebook.get_cell({i}).input_prompt_number)")
            wait("Number(document.querySelector('.lah')?.dataset.frames) >= 3")
            wait("Number(document.querySelector('.lah-training')?.dataset.ticks) >= 4 && document.querySelectorAll('.js-plotly-plot .main-svg').length >= 3")
            wait("document.querySelectorAll('.widget-button').length >= 5")
            frames, began = int(page.get_attribute('.lah', 'data-frames')), time.monotonic()
            page.wait_for_timeout(5000)
            rate = (int(page.get_attribute('.lah', 'data-frames')) - frames) / (time.monotonic() - began)
            page.locator('.lah .picture').focus()
            page.keyboard.press('ArrowRight')
            wait("document.querySelector('.lah .detail').innerText.includes('12D3KooW')")
            page.locator('.widget-button:has-text("Pause")').click()
            wait("document.querySelector('.lah-training').dataset.state === 'paused'")
            assert 'no torch' in text(6), text(6)
            run(7)
            wait("!document.querySelector('.lah') && Jupyter.notebook.get_cell(1).output_area.element.find('img').length === 1")
            page.evaluate('Jupyter.notebook.session.delete()')
            errors = [error for error in errors if error != 'Widget is not attached.']  # ipywidgets 7 says so whenever an output with a widget is replaced
            assert rate > 1 and not errors and not context.left, (rate, errors, context.left)
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('notebook', 'ipywidgets', 'anywidget', 'plotly', 'ipykernel'))
    print(f'Python {sys.version.split()[0]}, {versions}: {rate:.1f} frames a second, curves, buttons and stills as they should be')


if __name__ == '__main__': main()
