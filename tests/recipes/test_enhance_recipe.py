import json

import numpy as np
import torch

from allears.models.enhance import Enhancer
from allears.recipes import RECIPES


def test_recipe_trains_saves_and_loads(small_corpus, tmp_path):
    """Twenty steps of the smallest preset: the loss falls, and the exported weights load and run as trained."""
    arguments = {
        "preset": "test",
        "batch": 2,
        "seconds": 1.0,
        "rirs": 2,
        "device": "cpu",
        "validation_clips": 2,
        "seed": 3,
    }
    result = RECIPES["enhance"]([str(small_corpus)], str(tmp_path / "run"), steps=20, **arguments)
    assert result.step == 20 and result.stop == "steps"
    assert np.isfinite(result.metrics["si_sdr_gain_2"])
    record = json.loads((tmp_path / "run" / "export.json").read_text())
    assert record["training"]["speakers"] == 2 and record["training"]["licences"] == ["CC0"]
    enhancer = Enhancer.from_pretrained(tmp_path / "run" / "export", device="cpu")
    x = torch.randn(8000) * 0.1
    y = enhancer(x, 16_000)
    assert y.shape == x.shape and (y - x).abs().max() > 1e-3
    assert torch.equal(y, enhancer(x, 16_000)) and not torch.equal(y, enhancer(x, 16_000, seed=1))


def test_recipe_starts_from_weights(small_corpus, tmp_path):
    arguments = {"preset": "test", "batch": 1, "seconds": 0.5, "rirs": 0, "device": "cpu", "validation_clips": 1}
    RECIPES["enhance"]([str(small_corpus)], str(tmp_path / "a"), steps=2, **arguments)
    RECIPES["enhance"](
        [str(small_corpus)], str(tmp_path / "b"), steps=1, start=str(tmp_path / "a" / "export"), lr=1e-9, **arguments
    )
    a, b = (Enhancer.from_pretrained(tmp_path / run / "export", device="cpu").net.state_dict() for run in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)
