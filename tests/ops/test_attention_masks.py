"""What the fused kernels get instead of (mask, causal): no row may be empty, whatever a kernel does with one."""

import math

import pytest
import torch

from allears.ops.attention.dense.masks import sight

CPU = torch.device("cpu")


def test_the_flag_alone_where_it_means_the_same():
    assert sight(None, False, 5, 9, torch.float32, CPU) == (None, False, None)
    assert sight(None, True, 5, 5, torch.float32, CPU) == (None, True, None)
    assert sight(None, True, 1, 9, torch.float32, CPU) == (None, False, None)  # one query at the end sees all keys


@pytest.mark.parametrize(("queries", "keys"), [(4, 6), (6, 4)])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_blind_queries_are_told_and_opened(queries, keys, kind):
    look = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    look[..., 3, :] = False
    look[..., 0, 1:] = False
    mask = {"none": None, "bool": look, "float": torch.zeros(look.shape).masked_fill(~look, -math.inf)}[kind]
    seen = look if kind != "none" else torch.ones_like(look)
    seen = seen & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    given, flag, blind = sight(mask, True, queries, keys, torch.float32, CPU)
    opened = given if given.dtype == torch.bool else given > -math.inf
    assert not flag and opened.any(-1).all()
    empty = ~seen.any(-1, keepdim=True)
    assert blind is None or torch.equal(blind.expand_as(empty), empty)
    assert (blind is None) == (kind == "none" and queries < keys)
    assert torch.equal(opened.expand_as(seen), seen | empty)


def test_an_added_mask_narrows_without_new_infinities():
    mask = torch.tensor([0.0, 1.5, torch.finfo(torch.float32).min, 1e9, -math.inf]).view(1, 1, 1, 5)
    given, _, blind = sight(mask, False, 1, 5, torch.float16, CPU)
    assert given.dtype == torch.float16 and not blind.any()
    assert given.flatten()[:2].tolist() == [0.0, 1.5] and given.flatten()[4] == -math.inf
    assert given.flatten()[2:4].isfinite().all() and given.flatten()[2] < -3e4 < 3e4 < given.flatten()[3]
