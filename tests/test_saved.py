"What a notebook keeps of a live view when its kernel is gone"
import nbformat, pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow
WIDGET = 'application/vnd.jupyter.widget-view+json'


def test_a_saved_notebook_shows_the_last_picture():
    nbconvert = pytest.importorskip('nbconvert')
    cells = ["from lah_nb import Swarm\nswarm = Swarm.local(peers=2, experts='ffn.[0:2].[0:4]', hidden_dim=16)\nother = Swarm.join(swarm.addrs[0])", 'swarm', 'other',
             "swarm.peers[0].kill()\ntold = swarm.monitor.wait(lambda told: any(p['state'] == 'gone' for p in told['peers']))\nimport time; time.sleep(1.5)", 'swarm.close()']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(nb, timeout=100, kernel_name='python3').execute()
    (closed, nothing), (left, kept) = ([output.data for output in cell.outputs] for cell in nb.cells[1:3])
    assert nothing['text/html'] == '' and 'lah-kept' in kept['text/html']
    assert WIDGET not in closed and '<img' in closed['text/html'] and '1 of 2 peers alive' in closed['text/html']
    assert WIDGET in left and '<img' in left['text/html']  # never closed: the widget, and the picture it began with
    page, _ = nbconvert.HTMLExporter().from_notebook_node(nb)
    assert page.count('src="data:image/svg+xml;base64,') == 2 and 'alt="SwarmView(1 of 2 peers alive' in page
