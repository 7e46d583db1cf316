"The house: folders are floors, imports go down only, and its front doors lead somewhere"
import importlib, subprocess, sys

import networkx as nx, pytest

import lah_nb

FLOORS = 'network', 'mixture', 'swarm', 'training', 'simulation', 'views', 'command'


def test_imports_make_no_circle():
    grimp = pytest.importorskip('grimp')
    graph = grimp.build_graph('lah_nb')
    arrows = nx.DiGraph((module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module))
    assert len(arrows) > 40
    assert not list(nx.simple_cycles(arrows))


@pytest.mark.parametrize('door', ['lah_nb', *(f'lah_nb.{floor}' for floor in FLOORS)])
def test_every_name_of_a_door_is_there(door):
    module = importlib.import_module(door)
    assert module.__all__ and not [name for name in module.__all__ if not hasattr(module, name)]
    assert set(module.__all__) <= set(dir(module))


def test_the_front_door_is_light():
    code = ('import sys, time\nbegan = time.perf_counter()\nimport lah_nb, lah_nb.swarm, lah_nb.mixture\nseconds = time.perf_counter() - began\n'
            'heavy = {"torch", "libp2p", "trio", "numpy", "plotly", "pandas", "networkx", "ipywidgets", "IPython"} & set(sys.modules)\n'
            'assert not heavy and seconds < 1, (heavy, seconds)\nfrom lah_nb import Swarm, DMoE\nassert "plotly" not in sys.modules and "ipywidgets" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


def test_the_package_is_the_command():
    said = subprocess.run([sys.executable, '-m', 'lah_nb', '--version'], capture_output=True, text=True, timeout=60)
    assert said.stdout == f'lah-nb {lah_nb.__version__}\n'
