"""The training loop. It knows no model: an :class:`Objective` draws its own batches and gives a loss."""

from allears.train.config import TrainConfig, TrainResult
from allears.train.loop import DivergedError, train
from allears.train.objective import Objective

__all__ = ["DivergedError", "Objective", "TrainConfig", "TrainResult", "train"]
