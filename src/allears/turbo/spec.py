"""What to change in a video diffusion pipeline, as a frozen value."""

from dataclasses import dataclass, field
from itertools import pairwise
from math import atan
from typing import Literal, get_args

from allears.diffusion.few_steps import CODE_MIDDLE_RAD, Kind
from allears.ops.attention.sparse_linear import SparseLinear
from allears.ops.gemm.schemes import SchemeName

Originals = Literal["stay", "cpu", "drop"]
Offload = Literal["none", "experts"]


@dataclass(frozen=True)
class Sparse:
    """Sparse-linear attention in every self-attention layer.

    Args:
        keep: share of the key blocks that a block of queries reads exactly, in (0, 1]; 0.03 is "97 % sparse".
        options: form, blocks, feature map and numbers.
        fitted: path stem of what :func:`allears.turbo.sparse.sparsify` wrote. ``None``: routers as they start, which
            pick blocks by pooled queries and keys, and a ratio of 0.9; then ``keep`` and ``options`` count. With a
            stem, layers and shares are the file's, and of ``options`` the precision alone is read.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """

    keep: float = 0.03
    options: SparseLinear = field(default_factory=lambda: SparseLinear(precision="int8_fp8"))
    fitted: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: {self.keep} given; wanted a share of the key blocks in (0, 1]")


@dataclass(frozen=True)
class Steps:
    """The few-step sampler of a distilled model (rCM, arXiv 2510.08431) in place of the pipeline's scheduler.

    Args:
        count: steps, from 1 to one more than ``middle_rad`` has.
        sigma_max: noise over signal at the start, positive: 80 for text to video, 200 for Wan 2.2 image to video.
        middle_rad: TrigFlow angles of the steps after the first, falling, in (0, pi / 2).
        sampler: ``"sde"``: fresh noise after each step. ``"ode"``: none, which is sharper and less robust.
        seed: of the fresh noise; ``None``: torch's generator of the device.

    Raises:
        ValueError: a number is out of its range.
    """

    count: int = 4
    sigma_max: float = 80.0
    middle_rad: tuple[float, ...] = CODE_MIDDLE_RAD
    sampler: Kind = "sde"
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(self.middle_rad) + 1:
            raise ValueError(
                f"count: {self.count} steps given; {len(self.middle_rad)} angles in middle_rad allow 1 to "
                f"{len(self.middle_rad) + 1}: give more angles"
            )
        if not self.sigma_max > 0:
            raise ValueError(f"sigma_max: {self.sigma_max} given; it must be positive")
        angles = (atan(self.sigma_max), *self.middle_rad[: self.count - 1], 0.0)
        if not all(after < before for before, after in pairwise(angles)):
            raise ValueError(
                f"middle_rad: {self.middle_rad} given; wanted angles that fall from atan(sigma_max) = {angles[0]:.4f} "
                "to 0"
            )
        _check("sampler", self.sampler, get_args(Kind))


@dataclass(frozen=True)
class TurboSpec:
    """What :func:`allears.turbo.accelerate` changes.

    Args:
        attention: of the self-attention layers; ``None`` leaves them dense.
        linear: numbers of the linear layers inside the blocks, weights and activations alike: FP8 (E4M3) or INT8, a
            scale for each row or for each tile of 128 x 128; ``None`` leaves them. Embeddings and output stay.
        norms: run each block with fused kernels: norm with modulation, norm of q and k with rotary positions, gated
            residual; with 8-bit linear layers what they read is quantised in the same pass.
        steps: the few-step sampler; ``None`` leaves the pipeline's scheduler, and 1 to 4 steps make sense only with
            weights that were distilled for them.
        skip: names of layers, or of what holds them, such as ``"blocks.0"``, that stay as they are.
        originals: where the weights that 8-bit layers replace wait for ``restore``: ``"cpu"``; ``"stay"``, where they
            are; ``"drop"``: nowhere, and the change is final.
        offload: ``"experts"``: of a pipeline with two transformers only the one that runs is on the device.
        graphs: replay each transformer as a CUDA graph from its second call on: small ones are otherwise slowed by the
            Python that launches their kernels. Costs the memory of a call; on a CPU nothing changes.

    Raises:
        ValueError: a field is not one of the values above, or graphs are asked for with experts that move.
    """

    attention: Sparse | None = field(default_factory=Sparse)
    linear: SchemeName | None = "fp8_row"
    norms: bool = True
    steps: Steps | None = None
    skip: tuple[str, ...] = ()
    originals: Originals = "cpu"
    offload: Offload = "none"
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.linear is not None:
            _check("linear", self.linear, get_args(SchemeName))
        _check("originals", self.originals, get_args(Originals))
        _check("offload", self.offload, get_args(Offload))
        if self.graphs and self.offload != "none":
            raise ValueError("graphs, offload: a graph needs weights that stay in place; give up one of the two")
        if isinstance(self.skip, str):
            raise ValueError(f"skip: the text {self.skip!r} given; wanted a tuple of names, as ({self.skip!r},)")

    def skips(self, name: str) -> bool:
        """Whether the layer stays as it is."""
        return any(f"{name}.".startswith(f"{part.rstrip('.')}.") for part in self.skip)


def _check(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} given; it must be one of {', '.join(map(repr, known))}")
