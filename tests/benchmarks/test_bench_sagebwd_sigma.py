"""The table of SageBwd's errors over sigma: exact gradients, what is averaged, the cases of a run on the CPU."""

import json

import pytest
import torch
from benchmarks.registry import CASES, load_all

from benchmarks import sagebwd_sigma

CPU = torch.device("cpu")


def test_exact_is_the_textbook_and_errors_are_relative():
    q, k, v, d_out = sagebwd_sigma.gaussian(20, 8, 2.0, 3, CPU)
    assert q.dtype == torch.bfloat16 and 1.5 < q.std() < 2.5 and 0.8 < v.std() < 1.2
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    wanted = (out.detach(), *torch.autograd.grad(out, leaves, d_out.double()))
    found = sagebwd_sigma.exact(q, k, v, d_out)
    errors = sagebwd_sigma.Errors()
    errors.add(found, wanted)
    errors.add([1.5 * x for x in wanted], wanted)
    rows = {row["metric"]: row for row in errors.rows("case", "system")}
    assert len(rows) == 8 and all(row["n"] == 2 for row in rows.values())
    assert rows["rel_err_dq"]["low"] < 1e-5 and rows["rel_err_dq"]["high"] == pytest.approx(0.5, rel=1e-3)
    assert rows["rel_err"]["value"] == pytest.approx(0.25, rel=1e-3) and rows["cosine_dv"]["value"] > 0.99999


def test_an_offset_is_one_for_each_channel():
    plain, moved = (sagebwd_sigma.gaussian(50, 8, 1.0, 0, CPU, offset)[1].float() for offset in (0.0, 4.0))
    moved -= plain
    assert moved.mean(1).abs().max() > 2 and moved.std(1).max() < 0.05


def test_a_run_on_the_cpu_has_the_paper_and_the_references(monkeypatch, tmp_path):
    load_all()
    monkeypatch.setattr(sagebwd_sigma, "FORWARD_SIZE", (96, 16))
    monkeypatch.setattr(sagebwd_sigma, "OFFSET_SIZE", (64, 16))
    paper = {s: sagebwd_sigma.PAPER[s] for s in (1, 5)}
    monkeypatch.setattr(sagebwd_sigma, "PAPER", paper)
    assert CASES["sagebwd_sigma"]((128,), (32,), 2, "cpu", results_folder=tmp_path, commit="abc").run() == 0
    document = json.loads((tmp_path / "sagebwd_sigma.json").read_text())
    found = {(r["case"], r["system"], r["metric"]): r for r in document["rows"]}
    assert found["sigma 5 D 32", "paper", "rel_err_dk"]["value"] == 0.201
    ours = [name for name in sagebwd_sigma.REFERENCES if found["sigma 5 D 32", name, "rel_err"]["n"] == 2]
    assert len(ours) == 3
    for case in ("sigma 1 D 32", "sigma 5 D 32"):
        row, half, tile = (
            found[case, f"allears-sagebwd-reference{end}", "rel_err_dv"] for end in ("", "-255", "-tile")
        )
        assert half["value"] < row["value"] < tile["value"] < 0.1
    assert (
        found["offset 6", "allears-nvfp4-drop_in", "rel_err_dq"]["value"]
        > found["offset 6", "allears-nvfp4-matched", "rel_err_dq"]["value"]
    )
    low, high = (found["forward sigma 1", name, "rel_err"]["value"] for name in ("allears-int8fp16", "allears-nvfp4"))
    assert low < 0.03 < high
    notes = [note for note in document["notes"] if "not available" in note]
    assert len(notes) == 3 and "allears-sagebwd: not available: only the reference runs on cpu" in notes
    with pytest.raises(ValueError, match="lengths, seeds: "):
        CASES["sagebwd_sigma"](()).run()
