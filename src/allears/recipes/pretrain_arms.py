"""The arms of the pre-training study of SageBwd.

The questions are those of arXiv 2603.02170: is 8-bit training as good as 16-bit, does it need QK-norm, does it suffer
from many tokens a step, and does smoothing of K or Q help? A small model and a short training do not come to the large
queries and keys that trouble 8 bits, so that some arms start with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from allears.ops.attention import Numerics
from allears.ops.attention.lowbit.options import GradScales

LARGE = 8
"""Tokens a step of the large batch, relative to the small one."""

STRESS = 3.0
"""Gain of the arms that start with large queries and keys: sigma 3 each, where the paper's table shows 8 % errors."""


@dataclass(frozen=True)
class Arm:
    """One training.

    Args:
        numerics, qk_norm, smooth_k, smooth_q, grad_scales: of the attention.
        large: eight times as many tokens a step.
        gain: factor on the queries and keys at the start; see :class:`allears.models.language.LanguageConfig`.
        seed: of weights and order.
        trace: keep the errors of SageBwd on the trained model's activations.
    """

    numerics: Numerics
    qk_norm: bool = True
    large: bool = False
    smooth_k: bool = True
    smooth_q: bool | None = None
    grad_scales: GradScales = "row"
    gain: float = 1.0
    seed: int = 0
    trace: bool = False

    @property
    def setting(self) -> str:
        """What an arm shares with the one that it is compared with: QK-norm, tokens a step, gain."""
        parts = ["qk-norm" if self.qk_norm else "no-qk-norm", "large" if self.large else "small"]
        return " ".join(parts + ([f"gain-{self.gain:g}"] if self.gain != 1 else []))

    @property
    def system(self) -> str:
        """The numerics, with what differs from the default; "row" scales are the default."""
        parts: list[str] = [self.numerics]
        if not self.smooth_k:
            parts.append("no-k-smoothing")
        if self.smooth_q:
            parts.append("q-smoothing")
        if self.grad_scales != "row":
            parts.append(f"{self.grad_scales}-scales")
        return "-".join(parts)

    @property
    def name(self) -> str:
        return f"{self.setting.replace(' ', '-')}/{self.system}/seed-{self.seed}"


def study_arms(seeds: Iterable[int] = (0, 1, 2)) -> list[Arm]:
    """The arms, the most important ones first: a study that runs out of time lacks the last ones.

    The headline pair (QK-norm, small) has all ``seeds``; so has the pair with many tokens a step, at the end. With a
    gain of :data:`STRESS` on normalised queries and keys their scores have a standard deviation of its square.
    """
    first, *others = seeds
    settings = [(True, False), (True, True), (False, False), (False, True)]
    pair: tuple[Numerics, Numerics] = ("exact", "sagebwd")
    arms = [Arm(n, seed=first, trace=n == "exact") for n in pair]
    arms += [Arm(n, seed=seed) for seed in others for n in pair]
    arms += [Arm(n, q, large, seed=first, trace=n == "exact") for q, large in settings[1:] for n in pair]
    arms += [Arm("sagebwd", q, large, smooth_k=False, seed=first) for q, large in settings]
    arms += [Arm(n, True, large, gain=STRESS, seed=first, trace=n == "exact") for large in (False, True) for n in pair]
    arms += [Arm("sagebwd", True, large, grad_scales="tile", seed=first) for large in (False, True)]
    arms += [Arm("sagebwd", q, large, smooth_q=True, seed=first) for q, large in settings]
    return arms + [Arm(n, True, True, seed=seed) for seed in others for n in pair]
