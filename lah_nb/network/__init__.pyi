from .spec import Spec as Spec, WireError as WireError
from .tensors import decode as decode, encode as encode
from .wire import (
    Assembler as Assembler,
    chunks as chunks,
    field as field,
    Header as Header,
    pack as pack,
    read_header as read_header,
    unpack as unpack,
)
from .shares import Busy as Busy, Limits as Limits, Rate as Rate, Share as Share
from .calls import (
    Answer as Answer,
    CallError as CallError,
    CallTimeout as CallTimeout,
    load_identity as load_identity,
    MemoryHub as MemoryHub,
    MemoryNetwork as MemoryNetwork,
    Network as Network,
    new_identity as new_identity,
    peer_id_of as peer_id_of,
    Refused as Refused,
    Request as Request,
    Unreachable as Unreachable,
    Usual as Usual,
    verify as verify,
)
from .portal import (
    close_portal as close_portal,
    open_portal as open_portal,
    Portal as Portal,
    PortalClosed as PortalClosed,
    unwrap as unwrap,
)
from .addresses import (
    AddressError as AddressError,
    circuit_addrs as circuit_addrs,
    listen_addr as listen_addr,
    ListenError as ListenError,
    own_addrs as own_addrs,
    split_addr as split_addr,
    split_circuit as split_circuit,
)
from .link import Link as Link, Traffic as Traffic
from .relay import Relay as Relay, RelayError as RelayError
from .key import (
    load_key as load_key,
    load_members as load_members,
    Members as Members,
    NotMember as NotMember,
    SwarmKey as SwarmKey,
    SwarmKeyError as SwarmKeyError,
)
from .whereabouts import Whereabouts as Whereabouts
from .dialling import Dialler as Dialler
from .host import Host as Host
from .peer import Peer as Peer
from .reach import answer_dial_back as answer_dial_back, find_reach as find_reach, Places as Places
from .records import (
    Lookup as Lookup,
    nearest as nearest,
    point as point,
    Record as Record,
    Records as Records,
)
from .contacts import Contacts as Contacts
from .lookup import Finder as Finder
from .glance import Glance as Glance
from .weather import (
    Constant as Constant,
    Exponential as Exponential,
    Trace as Trace,
    Weather as Weather,
    Weibull as Weibull,
)
from .board import Board as Board
from .events import Event as Event, EventLog as EventLog, read_events as read_events
from .census import own_part as own_part, read_census as read_census
from .reading import Reader as Reader, Unanswered as Unanswered
from .dht import DHT as DHT, NoPeers as NoPeers
