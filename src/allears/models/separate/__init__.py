"""Speech separation: each talker apart; the model card is README.md beside this file."""

from allears.models.separate.config import PRESETS, SeparateConfig
from allears.models.separate.pipeline import Separated, SeparateResult, Separator

__all__ = ["PRESETS", "SeparateConfig", "SeparateResult", "Separated", "Separator"]
