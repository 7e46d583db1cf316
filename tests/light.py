"What works without torch and libp2p, from an installed wheel: scripts/pythons runs this on every Python at hand"
import compileall, importlib, json, pkgutil, subprocess, sys
from pathlib import Path

import lah_nb

HEAVY = 'torch', 'libp2p', 'multiaddr', 'sklearn'

def run(*args): return subprocess.run([Path(sys.executable).with_name('lah-nb'), *args], capture_output=True, text=True, timeout=60)


def main():
    assert compileall.compile_dir(lah_nb.__path__[0], quiet=1, force=True)
    light = set()
    modules = [module.name for module in pkgutil.walk_packages(lah_nb.__path__, 'lah_nb.') if '._' not in module.name]
    for name in modules:
        try: light.add(importlib.import_module(name).__name__.rpartition('.')[2])
        except ModuleNotFoundError as error: assert error.name.partition('.')[0] in HEAVY, error
    assert {'cli', 'doctor', 'layout', 'live', 'panels', 'study', 'style', 'swarm_view', 'training_view', 'figures'} <= light, light

    assert lah_nb.__version__ in run('--version').stdout
    for command in '', 'demo', 'peer', 'train', 'status', 'collect', 'doctor': assert 'usage: lah-nb' in run(*command.split(), '--help').stdout, command
    doctor = run('doctor', '--json')
    found = {check['what']: check['state'] for check in json.loads(doctor.stdout.splitlines()[-1])['checks']}
    assert found['Python'] == 'good' and found['torch'] == 'bad' and doctor.returncode, found

    from lah_nb import PeerPanel, SwarmView, hosting_figure, swarm_figure
    from synthetic import SOURCE
    scope = {}
    exec(SOURCE, scope)
    source = scope['Source'](8, 4, 8)
    view = SwarmView(source)
    assert '<img' in view.still()
    view.close()
    PeerPanel().close()
    for figure in swarm_figure(source()), hosting_figure(source()): assert figure.to_plotly_json()['data']
    print(f'Python {sys.version.split()[0]}: {len(light)} of {len(modules)} modules without torch and libp2p, the command, the views and the figures')


if __name__ == '__main__': main()
