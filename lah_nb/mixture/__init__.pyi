from .uids import ExpertError as ExpertError, join_uid as join_uid, parse_uids as parse_uids, split_uid as split_uid
from .classes import (
    expert_schema as expert_schema,
    EXPERTS as EXPERTS,
    register_expert as register_expert,
    Schema as Schema,
)
from .learning import Learning as Learning, OPTIMIZERS as OPTIMIZERS, remembered as remembered
from .experts import BadGradient as BadGradient, Expert as Expert
from .packed import load_expert as load_expert, save_expert as save_expert
from .runtime import (
    Late as Late,
    Overloaded as Overloaded,
    Runtime as Runtime,
    RuntimeStopped as RuntimeStopped,
)
from .gating import (
    Balance as Balance,
    beam_search as beam_search,
    Gate as Gate,
    GridError as GridError,
    max_violation as max_violation,
    mix as mix,
    mix_gradient as mix_gradient,
    mixing_weights as mixing_weights,
    score_of as score_of,
    search as search,
    search_path as search_path,
    table_successors as table_successors,
)
from .server import claim as claim, Server as Server
from .copies import Copies as Copies
from .replicas import Replicas as Replicas
from .repeats import Repeats as Repeats
from .roster import Roster as Roster
from .adoption import Adoption as Adoption, keep_alive as keep_alive
from .trace import recorder as recorder, recording as recording, Span as Span, span as span
from .dispatch import (
    Ask as Ask,
    Call as Call,
    gather_outputs as gather_outputs,
    group_pairs as group_pairs,
    keep_pairs as keep_pairs,
    Outcome as Outcome,
    stand_ins as stand_ins,
    sum_gradients as sum_gradients,
)
from .rounds import make_calls as make_calls, Round as Round
from .audit import Audits as Audits, Standing as Standing
from .stats import Dispatch as Dispatch, Stats as Stats
from .dmoe import DMoE as DMoE, Timeout as Timeout
from .exchange import TooFewExperts as TooFewExperts
from .home import at_home as at_home, HomeMoE as HomeMoE
