"""Merging of models that were tuned apart from one base, by the differences of their weights.

A model tuned for sparse attention and one distilled to few steps, both from the same base, merge into one that is both:
W = W_distilled + w (W_sparse - W_base) (TurboDiffusion, arXiv 2512.16093; the thought is task arithmetic, Ilharco et
al., arXiv 2212.04089).
"""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allears.core.weights import load_weights, save_weights

State = Mapping[str, Tensor]


def merge_deltas(base: State, tuned: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """base + sum of weight * (tuned - base), tensor by tensor, computed in float64 and stored as the base has it.

    Tensors that the base lacks (a router, a projection of the linear branch) are copied from the one model that has
    them. Tensors that are no floating-point numbers must be equal everywhere.

    Args:
        base: what all were tuned from.
        tuned: the models; at least one.
        weights: one for each, 1 by default.

    Raises:
        ValueError: the numbers of models and weights differ, a tensor is missing or of another shape, or two models
            add one of the same name.
    """
    weights = [1.0] * len(tuned) if weights is None else list(weights)
    if not tuned or len(weights) != len(tuned):
        raise ValueError(
            f"weights: {len(weights)} given for {len(tuned)} models; give one for each, one model at least"
        )
    merged: dict[str, Tensor] = {}
    for name, old in base.items():
        news = [_fitting(state, index, name, old) for index, state in enumerate(tuned)]
        if not old.is_floating_point():
            if different := [index for index, new in enumerate(news) if not torch.equal(new, old)]:
                raise ValueError(f"tuned[{different[0]}]: {name!r} holds {old.dtype} and differs; it cannot be merged")
            merged[name] = old.clone()
            continue
        wide = old.to(torch.float64)
        total = sum((w * (new.to(wide) - wide) for w, new in zip(weights, news, strict=True)), torch.zeros_like(wide))
        merged[name] = (wide + total).to(old.dtype)
    for index, state in enumerate(tuned):
        for name in sorted(state.keys() - base.keys()):
            if name in merged:
                raise ValueError(f"tuned[{index}]: {name!r} is not in the base, and an earlier model adds it too")
            merged[name] = state[name].clone()
    return merged


def merge_files(
    base: str | os.PathLike[str],
    tuned: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
) -> None:
    """:func:`merge_deltas` of weights at path stems; the record of the first tuned model goes with the result.

    Raises:
        WeightsError: a file is missing or corrupt.
    """
    states = [load_weights(stem) for stem in (base, *tuned)]
    merged = merge_deltas(states[0][0], [tensors for tensors, _ in states[1:]], weights)
    amounts = [1.0] * len(tuned) if weights is None else list(weights)
    parts = [
        {"weight": w, "training": record.get("training")} for w, (_, record) in zip(amounts, states[1:], strict=True)
    ]
    save_weights(out, merged, {**states[1][1], "merged": parts}, dtype="float32")


def _fitting(state: State, index: int, name: str, old: Tensor) -> Tensor:
    if name not in state:
        raise ValueError(f"tuned[{index}]: lacks {name!r}, which the base has; was it tuned from this base?")
    if state[name].shape != old.shape:
        raise ValueError(
            f"tuned[{index}]: {name!r} is {tuple(state[name].shape)}, {tuple(old.shape)} in the base; was it tuned "
            f"from this base?"
        )
    return state[name]
