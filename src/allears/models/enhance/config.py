"""Configuration of the flow-matching enhancer, and its sizes."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class EnhanceConfig:
    """What defines a trained enhancer. Sizes are presets (:data:`PRESETS`).

    Args:
        sample_rate_hz: rate of the core; pipelines resample around it.
        n_fft, hop: the STFT, in samples; n_fft / 2 + 1 bins must be a multiple of 4.
        power: magnitudes are compressed to |X|^power, phases kept (Welker et al., SGMSE, 2022).
        gain: factor on the compressed spectrum.
        prior: mean of the flow's prior: the ``noisy`` recording, or zero (``gaussian``).
        sigma: standard deviation of the prior, in units of the state.
        widths: channels at full, half and quarter frequency resolution.
        blocks: dual-path blocks at the lowest resolution.
        heads: attention heads.
        steps: sampler steps that the shipped weights are meant for.
        solver: ``euler``, ``midpoint`` or ``heun``.
    """

    sample_rate_hz: int = 16_000
    n_fft: int = 510
    hop: int = 128
    power: float = 0.5
    gain: float = 0.15
    prior: Literal["noisy", "gaussian"] = "noisy"
    sigma: float = 0.5
    widths: tuple[int, int, int] = (32, 64, 128)
    blocks: int = 8
    heads: int = 4
    steps: int = 1
    solver: Literal["euler", "midpoint", "heun"] = "euler"

    def __post_init__(self) -> None:
        if (self.n_fft // 2 + 1) % 4:
            raise ValueError(f"n_fft: {self.n_fft} gives {self.n_fft // 2 + 1} bins; a multiple of 4 is needed")
        if self.widths[2] % self.heads or (self.widths[2] // self.heads) % 2:
            raise ValueError(f"heads: {self.heads} must divide {self.widths[2]} channels into heads of even size")


_BASE = EnhanceConfig()
PRESETS: dict[str, EnhanceConfig] = {
    "test": replace(_BASE, widths=(8, 16, 32), blocks=1, heads=2),
    "tiny": replace(_BASE, widths=(16, 32, 64), blocks=4, heads=2),
    "base": _BASE,
}
