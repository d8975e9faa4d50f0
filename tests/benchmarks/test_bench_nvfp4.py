import math

import numpy as np
import pytest
import torch
from benchmarks.activations import Recorded, attention_of, recording
from benchmarks.clips import Clip
from benchmarks.nvfp4 import (
    SPECS,
    SYSTEMS,
    below,
    compare,
    hadamard,
    joined,
    output_rows,
)
from torch import nn

from allears.models.enhance import PRESETS, Enhancer
from allears.models.enhance.model import EnhanceNet
from allears.nn.attention import SelfAttention
from allears.ops.attention import AttentionSpec, attention


class Layers(nn.Module):
    """Two layers of different kinds: grouped and causal with positions and norm, and plain with a scale."""

    def __init__(self):
        super().__init__()
        self.along_time = SelfAttention(32, 4, qk_norm=True, kv_heads=2, causal=True)
        self.along_frequency = SelfAttention(32, 2, rope=False, spec=AttentionSpec(scale=0.5))

    def forward(self, x, mask=None):
        return self.along_frequency(self.along_time(x, offset=3), mask)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Layers().requires_grad_(False)


def _by_key(rows):
    return {(row["case"], row["system"], row["metric"]): row["value"] for row in rows}


def test_what_is_recorded_gives_the_layers_output(model):
    """Sequences are the ones that the spread picks, and offset, causal and scale come along."""
    outputs = {}
    for name in ("along_time", "along_frequency"):
        layer = getattr(model, name)
        layer.out.register_forward_pre_hook(lambda _, given, name=name: outputs.__setitem__(name, given[0]))
    with recording(model, lambda name: {"along_time": 2, "along_frequency": 9}[name]) as acts:
        model(torch.randn(5, 20, 32))
    assert acts["along_time"].q.shape == (2, 20, 4, 8) and acts["along_time"].k.shape == (2, 20, 2, 8)
    for name, chosen in (("along_time", [0, 2]), ("along_frequency", [0, 1, 2, 3, 4])):
        act = acts[name]
        found = attention(act.q, act.k, act.v, AttentionSpec(causal=act.causal, scale=act.scale))
        assert torch.allclose(found.flatten(2), outputs[name][chosen], atol=1e-6)
    assert (acts["along_time"].causal, acts["along_frequency"].scale) == (True, 0.5)
    acts.clear()
    model(torch.randn(1, 4, 32))
    assert not acts  # the hooks are gone


def test_masks_and_models_without_attention_are_refused(model):
    with recording(model, lambda name: 1), pytest.raises(ValueError, match="layer 'along_frequency' attends with a ma"):
        model(torch.randn(1, 4, 32), torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="Linear holds no SelfAttention"), recording(nn.Linear(2, 2), lambda name: 1):
        pass


def test_another_attention_for_a_while(model):
    x = torch.randn(2, 40, 32)
    before = [model.along_time.spec, model.along_frequency.spec]
    exact = model(x)
    with pytest.raises(RuntimeError), attention_of(model, SPECS["allears-nvfp4"]):
        assert model.along_time.spec.causal and model.along_frequency.spec.scale == 0.5
        rounded = model(x)
        raise RuntimeError
    assert [model.along_time.spec, model.along_frequency.spec] == before
    error = float((rounded - exact).norm() / exact.norm())
    assert 0.005 < error < 0.3 and torch.equal(model(x), exact)


def test_rows_are_those_of_all_outputs_joined():
    """Exact 1 in a layer of 2 numbers and 3 in one of 4; a system that is 10 % too large in the second alone."""
    act = {
        f"b.{n}.along_{kind}": Recorded(torch.zeros(s, 1, 1, 2), torch.zeros(s, 1, 1, 2), v, False, None)
        for n, kind, s, v in ((0, "time", 1, torch.ones(1, 1, 1, 2)), (1, "frequency", 2, 3 * torch.ones(2, 1, 1, 2)))
    }
    systems = {"same": lambda a: a.v, "large": lambda a: torch.where(a.v > 2, 1.1 * a.v, a.v)}
    rows = _by_key(compare(act, systems, lambda name: name.rpartition(".")[2], "x"))
    assert len(rows) == 2 * 2 * 5  # systems, metrics, and all, two kinds, two layers
    assert rows["x", "same", "rel_err"] == 0 and rows["x", "same", "cosine"] == 1
    assert rows["x", "large", "rel_err"] == pytest.approx(math.sqrt(4 * 0.09 / (2 + 36)), rel=1e-5)
    assert rows["x", "large", "cosine"] == pytest.approx((2 + 4 * 9.9) / math.sqrt(38 * (2 + 4 * 10.89)), rel=1e-5)
    assert rows["x, along_frequency", "large", "rel_err"] == pytest.approx(0.1, rel=1e-5)
    assert rows["x, b.0.along_time", "large", "rel_err"] == 0


def test_a_layer_below_the_mark_is_named():
    facts = {"system": "allears-nvfp4", "metric": "cosine"}
    rows = [facts | {"case": "x, a", "value": 0.99}, facts | {"case": "x, b", "value": 1.0}]
    assert below(rows, "x", {"a": None, "b": None}).endswith("under a cosine of 0.995: a (0.9900)")
    assert below(rows[1:], "x", {"b": None}).endswith("0.995: none")


def test_every_system_is_close_to_exact_attention():
    """On white noise; each operand left in float32 takes error off, and two-level P is no worse than direct P."""
    torch.manual_seed(0)
    act = Recorded(torch.randn(1, 200, 4, 32), torch.randn(1, 200, 2, 32) + 1, torch.randn(1, 200, 2, 32), True, 0.15)
    rows = _by_key(compare({"x.along_time": act}, SYSTEMS, lambda name: "t", "c"))
    error = {name: rows["c", name, "rel_err"] for name in SYSTEMS}
    assert all(1e-5 < value < 0.3 for value in error.values()), error
    parts = [error[f"nvfp4-only-{part}"] for part in ("qk", "p", "v")]
    assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(error["allears-nvfp4"], rel=0.1)
    assert error["allears-nvfp4"] <= error["allears-nvfp4-direct-p"]
    assert error["allears-nvfp4"] < min(error["mxfp4"], error["allears-nvfp4-no-smoothing"])
    assert error["allears-int8fp16"] < error["allears-int8fp8"] < error["allears-nvfp4"]


def test_hadamard_is_orthogonal_and_flat():
    turn = hadamard(32)
    assert torch.allclose(turn @ turn.T, torch.eye(32), atol=1e-6)
    assert torch.allclose(turn.abs(), torch.full((32, 32), 32**-0.5))


def _clip(seed, length=8000):
    rng = np.random.default_rng(seed)
    voice = (0.1 * rng.standard_normal(length)).astype(np.float32)
    return Clip(f"clip{seed}", voice + (0.05 * rng.standard_normal(length)).astype(np.float32), voice, {})


def test_joined_clips_have_one_level():
    quiet = _clip(1)
    x = joined([_clip(0), quiet._replace(noisy=0.01 * quiet.noisy)])
    assert x.shape == (1, 16000)
    levels = x.view(2, 8000).square().mean(-1).sqrt()
    assert torch.allclose(levels, torch.tensor([0.05, 0.05]), rtol=1e-4)


def test_outputs_are_compared_with_those_of_exact_attention(monkeypatch):
    monkeypatch.setattr("benchmarks.nvfp4.METRICS", ("si_sdr_db",))
    torch.manual_seed(0)
    net = EnhanceNet(PRESETS["test"])
    nn.init.normal_(net.leave.weight, std=0.3)  # an untrained network returns its input
    enhancer = Enhancer(net, "cpu")
    specs = {"allears-nvfp4": SPECS["allears-nvfp4"], "the same": AttentionSpec("reference")}
    rows = _by_key(output_rows(enhancer, [_clip(0), _clip(1)], specs, "o"))
    assert rows["o", "exact", "si_sdr_db"] == pytest.approx(rows["o", "the same", "si_sdr_db"], abs=1e-3)
    change = rows["o", "allears-nvfp4", "si_sdr_db"] - rows["o", "exact", "si_sdr_db"]
    assert rows["o", "allears-nvfp4", "si_sdr_db_gain"] == pytest.approx(change, abs=1e-4) and change != 0
    near, far = rows["o", "the same", "si_sdr_to_exact_db"], rows["o", "allears-nvfp4", "si_sdr_to_exact_db"]
    assert 10 < far < 60 and near > far + 20
    assert rows["o", "allears-nvfp4", "si_sdr_to_exact_db_min"] <= far
