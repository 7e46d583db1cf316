from .rehearsal import Costs as Costs, rehearse as rehearse
from .world import in_virtual_time as in_virtual_time, World as World
from .scale import simulate as simulate
from .paced import SimulatedSwarm as SimulatedSwarm
from .faults import Fault as Fault, schedule as schedule, Stormy as Stormy
from .chaos import chaos as chaos
from .links import compare_links as compare_links, timelines as timelines
