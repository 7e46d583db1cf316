from .rehearsal import Costs as Costs, rehearse as rehearse
from .world import in_virtual_time as in_virtual_time, World as World
from .scale import simulate as simulate
