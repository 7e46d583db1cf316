from . import command as command, mixture as mixture, network as network, swarm as swarm, training as training, views as views

__version__: str

from .errors import LahError as LahError
from .mixture import (
    at_home as at_home,
    DMoE as DMoE,
    Learning as Learning,
    register_expert as register_expert,
    Timeout as Timeout,
    TooFewExperts as TooFewExperts,
)
from .network import Weather as Weather
from .swarm import (
    collect as collect,
    Snapshot as Snapshot,
    Swarm as Swarm,
    SwarmError as SwarmError,
    Volunteer as Volunteer,
    volunteer as volunteer,
)
from .training import (
    call_stats as call_stats,
    CausalTransformer as CausalTransformer,
    Classifier as Classifier,
    constant as constant,
    cosine as cosine,
    dense_ffn as dense_ffn,
    load_digits as load_digits,
    load_images as load_images,
    load_mnist as load_mnist,
    load_text as load_text,
    load_wikitext2 as load_wikitext2,
    perplexity as perplexity,
    Recipe as Recipe,
    RECIPES as RECIPES,
    TensorBoard as TensorBoard,
    Trainer as Trainer,
)
from .views import (
    beam_figure as beam_figure,
    Dashboard as Dashboard,
    ExpertView as ExpertView,
    hosting_figure as hosting_figure,
    latency_figure as latency_figure,
    load_figure as load_figure,
    PeerPanel as PeerPanel,
    Recording as Recording,
    swarm_figure as swarm_figure,
    SwarmView as SwarmView,
    time_figure as time_figure,
    timeline_figure as timeline_figure,
    training_figure as training_figure,
    TrainingView as TrainingView,
    WeatherPanel as WeatherPanel,
)
