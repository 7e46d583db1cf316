from .world import in_virtual_time as in_virtual_time, World as World
from .index import simulate as simulate
