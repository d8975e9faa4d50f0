"""The choices of sparse-linear attention, as a frozen value."""

from dataclasses import dataclass
from typing import Literal, get_args

Form = Literal["sla2", "sla", "sparse"]
FeatureMap = Literal["softmax", "elu", "relu"]
Precision = Literal["exact", "int8_fp8"]
Backward = Literal["drop_in", "matched"]

BLOCKS_Q = (64, 128)
BLOCKS_K = (64,)


@dataclass(frozen=True)
class SparseLinear:
    """What the two branches compute and how they are put together; see the README of this folder for the equations.

    Args:
        form: ``"sla2"``: ratio * O_s + (1 - ratio) * O_l, O_l over exactly the blocks that O_s leaves out (SLA2,
            arXiv 2602.12675, section 5.1 of Eq. 13). ``"sla"``: O_s + proj(O_l), O_l over the marginal blocks only
            (SLA, arXiv 2509.24006). ``"sparse"``: O_s alone.
        block_q: queries of a block, 64 or 128.
        block_k: keys of a block, 64.
        feature_map: of the linear branch: ``"softmax"`` over the head size, ``"elu"`` (elu(x) + 1) or ``"relu"``
            (relu(x) + 1e-6).
        smooth_k: take the mean over a sequence's keys off K before the feature map and before INT8, as the router
            does. The softmax branch is the same either way. Off in causal calls, where it would look ahead.
        precision: numbers of the two products of the softmax branch: ``"exact"`` is the dtype of the inputs,
            ``"int8_fp8"`` is INT8 for Q K^T and FP8 for P V. The linear branch stays in the dtype of the inputs.
        backward: gradient of the ``int8_fp8`` forward. ``"drop_in"``: 16-bit, from the given q, k, v with the
            forward's output and log-sum-exp (the paper's). ``"matched"``: from the rounded operands of the forward.
            Not read by ``"exact"``.

    Raises:
        ValueError: a field is not one of the values above.
    """

    form: Form = "sla2"
    block_q: int = 128
    block_k: int = 64
    feature_map: FeatureMap = "softmax"
    smooth_k: bool = True
    precision: Precision = "exact"
    backward: Backward = "drop_in"

    def __post_init__(self) -> None:
        _check_choice("form", self.form, get_args(Form))
        _check_choice("block_q", self.block_q, BLOCKS_Q)
        _check_choice("block_k", self.block_k, BLOCKS_K)
        _check_choice("feature_map", self.feature_map, get_args(FeatureMap))
        _check_choice("smooth_k", self.smooth_k, (True, False))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("backward", self.backward, get_args(Backward))


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known or type(value) is not type(known[0]):
        raise ValueError(f"{name}: {value!r} given; it must be one of {', '.join(map(repr, known))}")
