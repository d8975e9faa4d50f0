import hashlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from allears.core.weights import load_weights
from allears.data.tokens import TokenData, TokenReport
from allears.recipes.pretrain import load_run, train_language
from allears.recipes.pretrain_objective import LanguageObjective, Windows
from allears.train.logs import read_log

CPU = torch.device("cpu")
TINY = {"preset": "test", "device": "cpu", "tokens_per_step": 256, "validation_windows": 4, "lr": 5e-3}


@pytest.fixture(scope="module")
def real_text() -> TokenData:
    """The licence, a byte a token: real English that nobody edits."""
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_bytes()
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    cut = len(tokens) - 3000
    report = TokenReport(257, 256, cut, 3000, 1, 1, cut, 3000, {"train": "a", "val": "b"}, [])
    return TokenData(tokens[:cut], tokens[cut:], report)


def _digest(folder: Path) -> str:
    tensors, _ = load_weights(folder / "ema")
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def test_windows_are_every_piece_once_a_lap_and_batches_share_the_order():
    tokens = np.arange(101, dtype=np.uint16)  # ten windows of 10 + 1
    windows = Windows(tokens, 10, 3, CPU)
    first_lap = windows.at(0, 10)
    assert sorted(first_lap[:, 0].tolist()) == list(range(0, 100, 10))
    assert torch.equal(first_lap, first_lap[:, :1] + torch.arange(11))
    assert torch.equal(torch.cat([windows.at(step * 2, 2) for step in range(10)]), windows.at(0, 20))
    second_lap = windows.at(10, 10)
    assert sorted(second_lap[:, 0].tolist()) == list(range(0, 100, 10)) and not torch.equal(first_lap, second_lap)
    assert torch.equal(Windows(tokens, 10, 3, CPU).at(7, 5), windows.at(7, 5))
    assert not torch.equal(Windows(tokens, 10, 4, CPU).at(0, 10), first_lap)
    assert windows.spread(5)[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert len(windows.spread(99)) == 10
    with pytest.raises(ValueError, match="tokens: 10 given, fewer than one window"):
        Windows(tokens[:10], 10, 0, CPU)


def test_loss_falls_on_real_text_and_the_same_seed_gives_the_same_weights(real_text, tmp_path):
    results = {
        name: train_language([], str(tmp_path / name), steps=60, seed=seed, data=real_text, **TINY)
        for name, seed in (("a", 1), ("again", 1), ("other", 2))
    }
    rows = [row for row in read_log(tmp_path / "a" / "log.jsonl") if row["kind"] == "validate"]
    assert rows[0]["val_loss"] == pytest.approx(np.log(257), abs=0.2)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 2.0
    assert rows[-1]["val_bits_per_byte"] == pytest.approx(rows[-1]["val_loss"] / np.log(2))
    assert _digest(tmp_path / "a") == _digest(tmp_path / "again") != _digest(tmp_path / "other")
    assert results["a"].metrics == results["again"].metrics
    record = json.loads((tmp_path / "a" / "export.json").read_text())
    assert record["training"]["tokens"] == 60 * 256 and record["training"]["numerics"] == "exact"
    model = load_run(tmp_path / "a", CPU)
    objective = LanguageObjective(real_text, 64, 4, 1, CPU, 4)
    with torch.no_grad():
        assert objective.validate(model)["val_loss"] == pytest.approx(results["a"].metrics["val_loss"], abs=1e-5)


def test_resumed_run_equals_an_unbroken_one(real_text, tmp_path):
    whole = train_language([], str(tmp_path / "whole"), steps=12, data=real_text, **TINY)
    broken = train_language(
        [],
        str(tmp_path / "broken"),
        steps=12,
        data=real_text,
        watch=lambda step: signal.raise_signal(signal.SIGTERM) if step == 7 else None,
        **TINY,
    )
    assert broken.stop == "signal" and broken.step == 8
    resumed = train_language([], str(tmp_path / "broken"), steps=12, data=real_text, **TINY)
    assert resumed.step == whole.step == 12
    assert _digest(tmp_path / "whole") == _digest(tmp_path / "broken")
    losses = [
        [row["loss"] for row in read_log(tmp_path / n / "log.jsonl") if "loss" in row] for n in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_large_batches_see_the_same_tokens_at_the_same_rates(real_text, tmp_path):
    """Rates as a function of tokens agree; so does what the objective draws."""
    for name, tokens in (("small", 256), ("large", 1024)):
        train_language(
            [],
            str(tmp_path / name),
            token_budget=40_960,
            data=real_text,
            warmup_share=0.1,
            log_rows=1000,
            validations=1,
            **{**TINY, "tokens_per_step": tokens},
        )
    rates = {}
    for name, tokens in (("small", 256), ("large", 1024)):
        rows = [row for row in read_log(tmp_path / name / "log.jsonl") if "lr" in row]
        rates[name] = {row["step"] * tokens: row["lr"] for row in rows}
    shared = [tokens for tokens in rates["large"] if tokens > 8192]
    assert len(shared) == 32
    for tokens in shared:  # the rate of a step is that of its start: one step of the large batch is four small ones
        later = rates["small"][tokens - 1024 + 256]
        assert rates["large"][tokens] == pytest.approx(later, rel=1e-6)
    small, large = (LanguageObjective(real_text, 64, batch, 5, CPU, 2) for batch in (4, 16))
    drawn = torch.cat([small.windows.at(step * 4, 4) for step in range(4)])
    assert torch.equal(drawn, large.windows.at(0, 16))


def test_bad_settings_are_named(real_text, tmp_path):
    cases = [
        ({"tokens_per_step": 100}, "tokens_per_step: 100 given; wanted a multiple of the context 64"),
        ({"preset": "huge"}, "preset: 'huge' is unknown"),
        ({"warmup_share": 0.5}, "warmup_share: 0.5"),
        ({"numerics": "int3"}, "numerics: 'int3'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            train_language([], str(tmp_path), steps=1, data=real_text, **{**TINY, **change})
    with pytest.raises(ValueError, match="corpus: 0 folders given"):
        train_language([], str(tmp_path), steps=1, **TINY)
