"""A kernel as the door sees it: what runs, whether this machine has it, and which calls it refuses."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from allears.ops.attention.call import Facts
from allears.ops.attention.spec import AttentionSpec

Run = Callable[..., Tensor | tuple[Tensor, Tensor]]


def nothing_missing() -> str:
    return ""


def always_trains(spec: AttentionSpec) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """A kernel that can be asked for by name.

    Args:
        name: what ``AttentionSpec(kernel=...)`` calls it; unique within its numerics.
        run: ``run(q, k, v, *, causal, scale, return_lse)`` to the output, or to (output, lse) with ``return_lse``.
            ``scale`` is always a number. More arguments come only where the call has them: ``mask``, 4-D, each size 1
            or the full one; the four of :class:`~allears.ops.attention.call.Packing`, with q (T_q, H, D) and k, v
            (T_k, G, D); and ``options``, the spec's ``LowBit``, in every family but ``exact``. Inputs are not changed.
        refuses: why a call does not fit, or ``""``. Of the call it sees the facts alone, and the answer is kept.
        missing: what this machine lacks for it, or ``""``; torch.compile takes its answer as a constant where it is
            marked :func:`~allears.ops.constant.constant_in_graphs`.
        trains: whether it has a backward under this spec; gradients asked of a kernel without one are an error.
        ragged: takes packed sequences without padding, and causal with L_q < L_k without a mask; for such calls
            ``auto`` tries these kernels first.
    """

    name: str
    run: Run
    refuses: Callable[[Facts, AttentionSpec], str]
    missing: Callable[[], str] = nothing_missing
    trains: Callable[[AttentionSpec], bool] = always_trains
    ragged: bool = False

    @property
    def reason(self) -> str:
        """Why this machine cannot run it at all; ``""`` where it can."""
        return self.missing()

    @property
    def available(self) -> bool:
        return not self.missing()

    def objection(self, facts: Facts, spec: AttentionSpec) -> str:
        """Why it does not run this call, or ``""``."""
        missing = self.missing()
        if missing:
            return missing
        if facts.grad and not self.trains(spec):
            return (
                "it has no backward and gradients are asked for; call it under torch.no_grad(), or on detached inputs, "
                "or choose numerics or lowbit options that train"
            )
        return self.refuses(facts, spec)
