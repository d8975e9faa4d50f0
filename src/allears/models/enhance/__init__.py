"""Flow-matching speech enhancement; the model card is README.md beside this file."""

from allears.models.enhance.config import PRESETS, EnhanceConfig
from allears.models.enhance.pipeline import Enhancer, FileResult

__all__ = ["PRESETS", "EnhanceConfig", "Enhancer", "FileResult"]
