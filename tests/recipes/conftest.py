"""Recipes are run for what they train, not for their pictures."""

import sys
from collections.abc import Iterator

import pytest

from allears.train import loop


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    """Curves and tensorboard take most of a run of a few steps; ``tests/train`` looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda out: None)
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        yield
