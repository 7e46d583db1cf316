from .snapshot import Snapshot as Snapshot
from .joining import Bootstrap as Bootstrap, run_bootstrap as run_bootstrap
from .hosting import Grid as Grid, run_peer as run_peer
from .lending import lend as lend, Lender as Lender
from .children import LocalPeer as LocalPeer, SwarmError as SwarmError
from .volunteering import Volunteer as Volunteer, volunteer as volunteer
from .monitor import Monitor as Monitor
from .swarm import RemotePeer as RemotePeer, Swarm as Swarm
from .collecting import collect as collect, Collected as Collected
