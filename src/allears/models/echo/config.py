"""Configuration of the echo canceller, and its sizes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EchoConfig:
    """What defines a trained echo canceller. Sizes are presets (:data:`PRESETS`).

    Args:
        sample_rate_hz: rate of the core; pipelines resample around it.
        n_fft, hop: the STFT, in samples; hop = n_fft / 2, and n_fft is a multiple of 16. The latency is n_fft samples.
        power: magnitudes enter as |X|^power, with their phases.
        widths: channels of a stage at a half, a quarter and an eighth of the bins.
        taps: frames that a convolution of a stage hears.
        hidden: size of the GRU over all bands.
        neck: numbers that each band gives it.
        align_frames: D; delays from 0 to D - 1 hops of the reference are looked at.
        align_heads, align_width: similarities between microphone and reference, and channels of what is compared.
        progressive: two stages, the first for the loudest echo; else one, with the last target.
        alignment: bring the reference into time; else it enters as it comes.
        voice: a head that tells near-end voice.
        voice_gate: the head closes the output where nobody at the near end speaks (if there is a head).
        gate_floor_db: gain of a closed gate.
        gate_hold_s: the gate stays open for so long after voice.
        gate_release_db_per_s: and closes that fast then; it opens at once.
        linear_input: the network of the pretraining: the output of a linear echo canceller stands where the first
            stage's output goes into the second. The weights are those of a network without.
    """

    sample_rate_hz: int = 16_000
    n_fft: int = 320
    hop: int = 160
    power: float = 0.3
    widths: tuple[int, int, int] = (32, 48, 64)
    taps: int = 2
    hidden: int = 224
    neck: int = 16
    align_frames: int = 100
    align_heads: int = 16
    align_width: int = 16
    progressive: bool = True
    alignment: bool = True
    voice: bool = True
    voice_gate: bool = True
    gate_floor_db: float = -40.0
    gate_hold_s: float = 0.06
    gate_release_db_per_s: float = 250.0
    linear_input: bool = False

    def __post_init__(self) -> None:
        if self.n_fft % 16 or self.hop * 2 != self.n_fft:
            raise ValueError(
                f"n_fft, hop: {self.n_fft}, {self.hop} given; a multiple of 16 and its half are wanted, as 320 and 160"
            )
        if self.align_frames < 2:
            raise ValueError(f"align_frames: {self.align_frames} given; at least 2 delays are wanted")
        if self.gate_floor_db > 0 or self.gate_hold_s < 0 or self.gate_release_db_per_s <= 0:
            raise ValueError(
                "gate_floor_db, gate_hold_s, gate_release_db_per_s: "
                f"{self.gate_floor_db:g}, {self.gate_hold_s:g}, {self.gate_release_db_per_s:g} given; wanted are at "
                "most 0, at least 0, and more than 0"
            )

    @property
    def bins(self) -> int:
        """F of the STFT."""
        return self.n_fft // 2 + 1

    @property
    def hop_s(self) -> float:
        return self.hop / self.sample_rate_hz

    @property
    def latency_ms(self) -> float:
        """From a sample's arrival at the core's rate to its being heard, the time to fill a hop included."""
        return 1000 * self.n_fft / self.sample_rate_hz


_BASE = EchoConfig()
PRESETS: dict[str, EchoConfig] = {
    "base": _BASE,
    "test": replace(_BASE, widths=(4, 6, 8), hidden=12, neck=3, align_frames=20, align_heads=2, align_width=4),
}
