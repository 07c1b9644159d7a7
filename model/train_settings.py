"""Settings of training; what is None is derived from the data."""

from enum import StrEnum

from pydantic import Field

from model.feedback import FeedbackSettings
from model.network import NetworkSettings
from model.settings import SettingsBase
from model.splits import SplitSettings


class Softmax(StrEnum):
    """How the softmax over the catalogue is computed in training."""

    AUTO = "auto"  # dense up to 20,000 items
    DENSE = "dense"
    SAMPLED = "sampled"  # importance sampling (§3.1)


class Device(StrEnum):
    """Where training runs."""

    AUTO = "auto"  # a GPU if there is one
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Of matrix products and softmax in training; weights and sums are float32 always."""

    AUTO = "auto"  # bfloat16 where the hardware has it and sizes make it pay (`model.device`)
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class TrainSettings(SettingsBase):
    """How a model is trained; None means: derived from the data."""

    network: NetworkSettings = NetworkSettings()
    split: SplitSettings = SplitSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    session_gap_seconds: int | None = None
    trend_decomposition: bool = True
    softmax: Softmax = Softmax.AUTO
    negatives: int | None = None  # draws per gradient step, sampled softmax; None: √M, 512 or more
    warm_start: str = "none"  # or champion, a version in the model store, a bundle's folder
    # Share of the positions scored by the items' fields alone (λ = 1), as new ones are; None: the
    # share of the log's last events that were on new items, ½ at most.
    fields_alone: float | None = Field(None, ge=0.0, lt=1.0)
    max_epochs: int = 60
    patience: int = 2  # epochs without a better validation loss, and PATIENT_STEPS steps at least
    learning_rate: float = 0.002
    row_learning_rate: float = 0.1  # of tables updated by rows (sampled softmax): Adagrad's
    plateaus: int = 3  # after each but the last, the learning rate falls; the last ends training
    plateau_factor: float = 0.3  # by which it falls
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    averaging_epochs: float = 1.0  # memory of the moving average of the weights; 0: none
    shuffle_ties: bool | None = None  # simultaneous events anew each epoch; None: `model.ties`
    value_weight: float = 0.1  # of the value head's squared error beside the softmax
    bptt: int = 50  # positions of one user per gradient step
    batch_events: int = 1024  # positions per gradient step
    part_events: int = 2_000_000  # of a larger log, this many are in memory, twice (`model.loader`)
    seed: int = 0
    threads: int | None = None
    device: Device = Device.AUTO
    precision: Precision = Precision.AUTO
    checkpoint_minutes: float = 5.0  # between checkpoints, where there is a folder for them

    def draws(self, num_items: int) -> int:
        """Negatives of a gradient step, by the number of items where not set."""
        return self.negatives or max(512, int(num_items**0.5))
