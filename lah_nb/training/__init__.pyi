from .data import (
    data_folder as data_folder,
    DataError as DataError,
    ImageData as ImageData,
    load_digits as load_digits,
    load_images as load_images,
    load_mnist as load_mnist,
    load_text as load_text,
    load_wikitext2 as load_wikitext2,
    text_data as text_data,
    TextData as TextData,
)
from .handed import handed as handed
from .models import (
    CausalTransformer as CausalTransformer,
    Classifier as Classifier,
    dense_ffn as dense_ffn,
    perplexity as perplexity,
)
from .flight import in_flight as in_flight
from .pace import Pace as Pace
from .optim import Muon as Muon, constant as constant, cosine as cosine, muon as muon, orthogonal as orthogonal
from .fitting import (
    Conductor as Conductor,
    History as History,
    Ledger as Ledger,
    Plan as Plan,
    Stopwatch as Stopwatch,
    TrainingError as TrainingError,
)
from .layers import call_stats as call_stats
from .scoring import objective as objective
from .trainer import Trainer as Trainer
from .recipes import Recipe as Recipe, RECIPES as RECIPES
from .tensorboard import TensorBoard as TensorBoard
from .sharing import Meeting as Meeting, Sharing as Sharing
