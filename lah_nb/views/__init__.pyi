from .style import (
    BLUE as BLUE,
    GREEN as GREEN,
    GREY as GREY,
    ORANGE as ORANGE,
    PALETTE as PALETTE,
    PURPLE as PURPLE,
    RED as RED,
    short as short,
    SKY as SKY,
    YELLOW as YELLOW,
)
from .layout import (
    grid_layout as grid_layout,
    place_experts as place_experts,
    place_peers as place_peers,
    ring_angle as ring_angle,
)
from .figures import (
    cost_of_event as cost_of_event,
    load_figure as load_figure,
    report as report,
    swarm_figure as swarm_figure,
    time_figure as time_figure,
    training_figure as training_figure,
)
from .study import (
    beam_figure as beam_figure,
    hosting_figure as hosting_figure,
    latency_figure as latency_figure,
    load_over_time_figure as load_over_time_figure,
    timeline_figure as timeline_figure,
)
from .live import Shown as Shown, Ticker as Ticker
from .recording import Recording as Recording
from .swarm_view import SwarmView as SwarmView
from .training_view import ExpertView as ExpertView, TrainingView as TrainingView
from .simulation_panel import SimulationPanel as SimulationPanel
from .panels import Dashboard as Dashboard, PeerPanel as PeerPanel, VolunteerView as VolunteerView
from .weather_panel import WeatherPanel as WeatherPanel
