from .logs import say as say, set_up_logs as set_up_logs
from .metrics import Metrics as Metrics, peer_metrics as peer_metrics, trainer_metrics as trainer_metrics
from .doctor import Check as Check, examine as examine
from .runs import demo as demo, train as train
from .cli import main as main, make_parser as make_parser
