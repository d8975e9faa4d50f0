"""The Python examples of the documents run as they are printed, on small models, in the order in which they stand."""

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from allears.nn.attention import CrossAttention, SelfAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.train import TrainConfig
from allears.turbo.sparse import SparseSettings

ROOT = Path(__file__).resolve().parents[1]


def blocks(path, section):
    """The Python blocks between a heading and the next of its rank."""
    text = (ROOT / path).read_text()
    rank = section.split()[0]
    found = re.split(rf"^{rank} ", text.partition(f"\n{section}\n")[2], flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```", found, re.DOTALL | re.MULTILINE)


class Small(nn.Module):
    """Self-attention whose keys come in clusters, and a look at a short context."""

    def __init__(self):
        super().__init__()
        self.attention = SelfAttention(16, 2, rope=False)
        self.cross = CrossAttention(16, 2)

    def forward(self, x, context):
        x = x + self.attention(x)
        return x + self.cross(x, context)


def batch(seed):
    draws = torch.Generator().manual_seed(seed)
    clusters = 2 * torch.randn(1, 7, 16, generator=draws).repeat_interleave(64, 1)
    return torch.randn(1, 448, 16, generator=draws) + clusters, torch.randn(1, 20, 16, generator=draws)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A model and its batches, and settings that fit it in a moment and leave its long layer sparse."""
    quick = {"keeps": (0.3,), "max_error": 0.9, "options": SparseLinear(block_q=64), "steps": 8, "query_blocks": 2}
    run = {"ema_decay": 0.0, "precision": "fp32", "device": "cpu", "log_every": 1}

    def settings(**asked):
        SparseSettings(**asked)
        return SparseSettings(**quick)

    def config(*asked, **more):
        return replace(TrainConfig(*asked, **more), steps=4, lr=1e-2, **run)

    monkeypatch.chdir(tmp_path)
    for module in ("allears.turbo.sparse", "allears.turbo.sparse.sparsify"):
        monkeypatch.setattr(import_module(module), "SparseSettings", settings)
    monkeypatch.setattr(import_module("allears.train"), "TrainConfig", config)
    torch.manual_seed(0)
    model = Small().eval()
    return {"model": model, "batches": [batch(seed) for seed in range(3)]}


def test_attention_in_the_readme(small, capsys):
    transformers = pytest.importorskip("transformers")
    _, exact, low_bit, sparse, fitted = blocks("README.md", "## Python")[:5]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **shape)).eval()
    tokens = torch.arange(400)[None] % 50
    names = {"model": llama, "inputs": tokens}
    exec(exact, names)
    assert names["out"].shape == (1, 1000, 8, 64) and "kernel='" in capsys.readouterr().out
    dense = llama(tokens)[0].detach()
    with torch.no_grad():
        exec(low_bit.replace("    ...", "    eight = model(inputs)[0]"), names)
    assert 1e-4 < (names["eight"] - dense).norm() / dense.norm() < 0.1
    wanted = names["attention"](*(names[x] for x in "qkv"))
    exec(sparse.replace("    ...", "    part = model(inputs)[0]"), names)
    assert (names["part"] - dense).norm() > 0.1 * (names["eight"] - dense).norm()
    assert names["out"].shape == wanted.shape and names["core"].keep == 0.05
    assert torch.equal(llama(tokens)[0], dense)
    names = small
    dense = names["model"](*names["batches"][0])
    exec(fitted.replace("    ...", "    part = model(*batches[0])"), names)
    assert torch.equal(names["model"](*names["batches"][0]), dense)
    assert "attention 71% sparse" in capsys.readouterr().out and not torch.equal(names["part"], dense)


def test_both_stages_of_sparse_attention_in_the_readme_of_turbo(small, capsys):
    first, second, by_hand = blocks("src/allears/turbo/README.md", "## Sparse attention, fitted to a model")
    model, inputs = small["model"], batch(9)
    names = {**small, "draw": lambda step, generator: batch(step), "held_out": [inputs]}
    dense = model(*inputs)
    exec(first.replace("    ...", "    fitted = model(*batches[0])"), names)
    assert torch.equal(model(*inputs), dense)
    assert not torch.equal(names["fitted"], model(*names["batches"][0]))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"attention 71% sparse error 0\.\d{3}, attention mass 0\.\d\d ", lines[0])
    assert re.match(r"cross 0% sparse error .* too short: at keep 0\.3", lines[1])
    before = model.attention.qkv.weight.clone()
    training, _, loading = second.partition("installed.restore()")
    exec(training, names)
    assert names["result"].step == 4 and not torch.equal(model.attention.qkv.weight, before)
    tuned = model(*inputs)
    assert not torch.equal(tuned, dense) and torch.equal(names["dense"](*inputs), dense)
    exec(f"installed.restore(){loading}", names)
    torch.testing.assert_close(model(*inputs), tuned)
    model.attention.core = None
    exec(by_hand, names)
    assert names["core"].stage == "hard" and re.match(r"attention Errors\(error=0\.", capsys.readouterr().out)
