"""Echo cancellation without a linear filter; the model card is README.md beside this file."""

from allears.models.echo.config import PRESETS, EchoConfig
from allears.models.echo.pipeline import EchoCanceller
from allears.models.echo.result import EchoResult

__all__ = ["PRESETS", "EchoCanceller", "EchoConfig", "EchoResult"]
