"""Every tutorial (or those named), restarted and run whole, twice, in a real JupyterLab: python tests/tutorials.py [--pictures FOLDER] [nbs/tutorials/01_quickstart.ipynb ...]

Not part of pytest, for it takes half an hour. No cell fails, no error happens in the page, each run takes less than ten minutes, and nothing is left running when the kernel has ended.
MNIST and WikiText-2 are read from LAH_DATA. The pictures, one for each cell with an output, are for looking at.
"""
import argparse, os, shutil, tempfile, time, uuid
from pathlib import Path

import psutil

from browser import Notebook, browser, jupyterlab

TUTORIALS = sorted((Path(__file__).parents[1] / 'nbs/tutorials').glob('*.ipynb'))
KNOWN = 'Canceled future for create_subshell_request'  # JupyterLab says so when a kernel ends that it was asking


def marked(mark):
    "Processes that a server started with this mark, and theirs"
    def has(p):
        try: return p.environ().get('LAH_MARK') == mark and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return {p for p in psutil.process_iter() if has(p)}


def run_all(nb, timeout=600):
    "Seconds, and the tracebacks of cells that failed"
    began = time.monotonic()
    nb.page.evaluate("() => { window.done = false; jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.done = true); return null }")
    nb.page.wait_for_function('window.done', timeout=timeout * 1000)
    return time.monotonic() - began, ['\n'.join(output['traceback'][-2:]) for i in range(nb.count()) for output in nb.outputs(i) if output['output_type'] == 'error']


def photograph(nb, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(nb.count()):
        if nb.outputs(i): nb.cell(i).screenshot(path=folder/f'{i:02}.png')


def check(path, pictures=None, times=2):
    "What is wrong with a tutorial"
    mark, wrong, seconds = uuid.uuid4().hex, [], []
    with tempfile.TemporaryDirectory() as folder, jupyterlab(folder, LAH_MARK=mark) as url:
        server = marked(mark)
        for name in path, path.with_name('colab.svg'): shutil.copy(name, folder)
        with browser(1250, 1400) as context:
            nb = Notebook(context, url, path.name)
            for _ in range(times):
                nb.restart()
                took, failed = run_all(nb)
                seconds.append(took)
                wrong += failed
            if pictures: photograph(nb, pictures/path.stem)
            nb.close()
            deadline = time.monotonic() + 20
            while (left := marked(mark) - server) and time.monotonic() < deadline: time.sleep(0.2)
            wrong += [f'left running: {" ".join(p.cmdline())[:200]}' for p in left]
            wrong += [error for error in nb.errors if KNOWN not in error] + [f'wants {url}' for url in set(context.left)]
    print(f'{path.stem}: {" and ".join(f"{s:.0f} s" for s in seconds)}; {len(wrong) or "nothing"} wrong; load {os.getloadavg()[0]:.1f}', *wrong, sep='\n    ', flush=True)
    return wrong


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='*', type=Path, default=TUTORIALS)
    parser.add_argument('--pictures', type=Path)
    args = parser.parse_args()
    raise SystemExit(any([check(path, args.pictures) for path in args.notebooks]))
