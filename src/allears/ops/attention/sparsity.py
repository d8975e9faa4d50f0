"""Training-free sparse attention as a part of the spec: which blocks of keys are read, by a rule without parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sparsity:
    """Each block of queries reads the key blocks that its pooled scores rank first (SpargeAttn, arXiv 2502.18137).

    Lossy: keys that are not read have no weight. Give exactly one of ``keep`` and ``mass``.

    Args:
        keep: share of the visible key blocks that each query block reads, in (0, 1]; at least one block.
        mass: read the fewest blocks whose softmax over the pooled scores sums to this share, in (0, 1].
        similarity: self-similarity (mean cosine of all pairs of rows) below which a block is never left out, in
            [0, 1]; None trusts every block's mean.
        block_q: queries of a block, 64 or 128.
        block_k: keys of a block, 64.
        smooth_k: take the mean key off before pooling and INT8; off in causal calls.

    Raises:
        ValueError: a field is out of range, or not exactly one of ``keep`` and ``mass`` is given.
    """

    keep: float | None = None
    mass: float | None = None
    similarity: float | None = None
    block_q: int = 128
    block_k: int = 64
    smooth_k: bool = True

    def __post_init__(self) -> None:
        check_rule(self.keep, self.mass, self.similarity)
        if self.block_q not in (64, 128) or self.block_k != 64:
            raise ValueError(
                f"block_q, block_k: {self.block_q}, {self.block_k} given; block_q must be 64 or 128 and block_k 64"
            )
        if not isinstance(self.smooth_k, bool):
            raise ValueError(f"smooth_k: {self.smooth_k!r} given; it must be True or False")


def check_rule(keep: float | None, mass: float | None, similarity: float | None) -> None:
    """Raise ValueError unless one of ``keep`` and ``mass`` is given, in (0, 1], and ``similarity`` is in [0, 1]."""
    if (keep is None) == (mass is None):
        raise ValueError(f"keep, mass: {keep} and {mass} given; give exactly one of them")
    for name, share in (("keep", keep), ("mass", mass)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}: {share} given; it must be in (0, 1]")
    if similarity is not None and not 0 <= similarity <= 1:
        raise ValueError(f"similarity: {similarity} given; it must be in [0, 1], or None to trust every mean")
