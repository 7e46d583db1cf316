"""Train large neural networks on computers that volunteers lend"""
__version__ = "0.1.0"

import lazy_loader as _lazy

from .viewers import VIEWERS as _VIEWERS

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)  # the names are in the stub beside this file
_VIEWERS.update(Swarm='lah_nb.views.swarm_view:SwarmView.of', Volunteer='lah_nb.views.panels:VolunteerView',
                SimulatedSwarm='lah_nb.views.simulation_panel:SimulationPanel')
