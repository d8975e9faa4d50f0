import os
import sys

import pytest
import torch

from allears.train import loop


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another cost more than such small products, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing and tensorboard take most of a short run's time; the tests that look at them ask for ``pictures``."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(loop, "draw_curves", lambda out: None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(os, "fsync", lambda number: None)  # slow on a busy disk


@pytest.fixture
def pictures():
    return True
