"""How the kernels of one call are launched, by the size of the problem."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Choices that change no result but the last bits of the linear branch's totals (``one_pass``).

    Args:
        early: a kernel begins while the one before it ends; see ``early.cuh``.
        one_pass: keys are quantised and their h summed in one pass (``summed.cu``) where a wave of its blocks fills
            ``_FULL`` of the multiprocessors, else in two (``quantise``, ``linear_totals``).
        v_ahead: ``quantise`` asks for V before it works on K: more bytes on their way, at no registers to spare.
        l2_hints: the second-level cache is asked to keep key blocks; see ``forward.cu``.
    """

    early: bool
    one_pass: bool = False
    v_ahead: bool = False
    l2_hints: bool = False


_FULL = 0.9

LAUNCHES: tuple[tuple[int, Launch], ...] = (
    # Elements of q up to which a row holds. Measured on an H100, (1, 32760, 12, 128) and (1, 75600, 40, 128) at 97 %
    # sparsity: ``early`` hides the starts of some 24 short kernels there (1.5 % less time), here (28 kernels of which
    # the shortest takes 5 times as long) it costs 1 %. ``l2_hints``: no difference at either.
    (150_000_000, Launch(early=True)),
    (2**62, Launch(early=True)),
)


def launch_for(elements: int) -> Launch:
    """Of a call whose q has so many elements."""
    return next(launch for most, launch in LAUNCHES if elements <= most)


def fills(blocks: int, multiprocessors: int) -> bool:
    """Whether so many blocks of threads, one a multiprocessor, are near enough to all of them."""
    return blocks >= _FULL * multiprocessors
