"""A small language model, for studies of attention that trains; the model card is README.md beside this file."""

from allears.models.language.config import PRESETS, LanguageConfig
from allears.models.language.model import LanguageModel

__all__ = ["PRESETS", "LanguageConfig", "LanguageModel"]
