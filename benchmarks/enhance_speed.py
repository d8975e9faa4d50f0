"""Speed and memory of enhancement on files, beside the peers."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .registry import case
from .speed import SpeedCase


@case("enhance_speed")
@dataclass
class EnhanceSpeedCase(SpeedCase):
    """Real-time factor (reading and writing counted, loading not) and peak resident memory on mono 16 kHz files."""

    systems: tuple[str, ...] = ("allears", "rnnoise", "nsnet2", "deepfilternet3")
    """Which systems."""

    steps: int | None = None
    """Sampler steps of the system allears."""

    name: str = "enhance_speed"
    """Name of the result file."""

    task: ClassVar[str] = "enhance"

    def options(self) -> dict[str, Any]:
        """Of the system allears."""
        return super().options() | ({} if self.steps is None else {"steps": self.steps})
