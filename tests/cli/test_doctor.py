"""``allears doctor``: every section is there, a damaged checkpoint is found, the table of extras is the project's."""

import json
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch

from allears.cli import doctor, kernels
from allears.cli.main import main
from allears.core.weights import save_weights

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
MODULE_OF = {"import-linter": "importlinter", "nvidia-cuda-nvrtc": "nvidia", "pytest-xdist": "xdist"}


def test_json_describes_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["allears"] == PROJECT["version"]
    assert report["torch"]["version"] == torch.__version__
    assert len(report["torch"]["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert report["machine"]["cpu_cores"] >= 1 and report["machine"]["memory_gib"] > 0
    assert {"wav", "flac"} <= set(report["audio"]["formats"])
    kernels = {kernel["name"]: kernel for kernel in report["attention"]}
    assert kernels["reference"]["available"] is True
    assert all(kernel["available"] or kernel["reason"] for kernel in kernels.values())


def test_text_has_every_section(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for section in ("machine", "audio files", "extras", "attention kernels", "models"):
        assert section in lines
    for section in ("attention by numerics (", "sparse and linear attention ("):
        assert any(line.startswith(section) for line in lines)


def test_extras_are_those_of_the_project():
    declared = PROJECT["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(declared)
    for name, (unlocks, modules) in doctor.EXTRAS.items():
        packages = [requirement.split(">=")[0] for requirement in declared[name]]
        assert list(modules) == [MODULE_OF.get(package, package) for package in packages] and unlocks


def test_a_missing_extra_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(doctor.EXTRAS, "media", ("any container", ("no_such_module",)))
    assert main(["doctor"]) == 0
    assert "no  media  any container; missing no_such_module: pip install 'allears[media]'" in capsys.readouterr().out


@pytest.fixture
def weights(tmp_path):
    save_weights(tmp_path / "tiny", {"a": torch.zeros(3, 5), "b": torch.zeros(7)}, {"model": "tiny"})
    return tmp_path


def test_good_weights_are_counted_and_verified(weights):
    (row,) = doctor.models(weights)
    assert row["name"] == "tiny" and row["parameters"] == 22 and row["ok"] and row["reason"] == ""


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "card"])
def test_damaged_weights_are_found_and_told(weights, damage):
    path = weights / "tiny.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "missing":
        path.unlink()
    else:
        (weights / "tiny.json").write_text("{")
    (row,) = doctor.models(weights)
    assert not row["ok"] and row["reason"] and "\n" not in row["reason"]
    report = {**doctor.examine(), "models": [row]}
    assert f"no  tiny: {row['reason']}" in doctor.to_text(report)


def test_a_broken_attention_room_is_shown_not_raised(monkeypatch):
    import allears.ops.attention as room

    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(room, "backends", broken)
    (row,) = doctor.attention_backends()
    assert row == {"name": "attention", "available": False, "reason": "RuntimeError: driver too old"}


def test_each_kind_of_numerics_says_what_runs_or_why_nothing_does(capsys):
    from allears.ops.attention import Numerics, explain

    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["numerics"]
    assert [row["numerics"] for row in rows] == list(get_args(Numerics))
    for row in rows:
        for use in ("inference", "training"):
            assert row[use]["kernel"] or row[use]["refused"]["all"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.empty(1, 256, 2, 128, dtype=torch.bfloat16, device=device)
    exact = explain(q, q, q)
    assert rows[0]["device"] == device and rows[0]["inference"]["kernel"] == exact.kernel
    assert rows[0]["inference"]["refused"] == exact.refused
    assert "reference" in [rows[0]["training"]["kernel"], *rows[0]["training"]["able"]]


def test_training_is_asked_about_with_gradients(monkeypatch):
    import allears.ops.attention as room

    def explain(q, k, v, spec):
        return room.Choice(f"{spec.numerics} {q.requires_grad and torch.is_grad_enabled()}", {})

    monkeypatch.setattr(room, "explain", explain)
    row = kernels.numerics_report()[1]
    assert (row["inference"]["kernel"], row["training"]["kernel"]) == ("int8_fp8 False", "int8_fp8 True")


def test_uses_that_differ_get_a_line_each_and_refusals_theirs():
    nothing = {"kernel": None, "able": [], "refused": {"all": "no gradient"}}
    fast = {"kernel": "quick", "able": ["slow"], "refused": {"best": "needs another GPU"}}
    lines = kernels.numerics_text(
        [
            {"numerics": "four", "device": "cuda", "inference": fast, "training": nothing},
            {"numerics": "eight", "device": "cuda", "inference": fast, "training": fast},
        ]
    )
    assert [line.strip() for line in lines] == [
        "four      inference: quick (also able: slow)",
        "not best: needs another GPU",
        "training: none: no gradient",
        "eight     inference and training: quick (also able: slow)",
        "not best: needs another GPU",
    ]


def test_numerics_of_a_broken_attention_room_are_shown_not_raised(monkeypatch):
    import allears.ops.attention as room

    def broken(*arguments):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(room, "explain", broken)
    for row in kernels.numerics_report():
        assert row["inference"] == {"kernel": None, "able": [], "refused": {"all": "RuntimeError: driver too old"}}
    monkeypatch.delattr(room, "Numerics")
    (row,) = kernels.numerics_report()
    assert row["training"]["kernel"] is None and "Numerics" in row["training"]["refused"]["all"]
    assert any("Numerics" in line for line in kernels.numerics_text([row]))


def test_numerics_that_train_by_their_reference_alone_are_told_how():
    rows = {row["numerics"]: row for row in kernels.numerics_report()}
    for kind, kernel in (("int8_fp8", "reference"), ("nvfp4", "reference"), ("int8_fp16", None)):
        assert rows[kind]["training"]["kernel"] is None
        assert rows[kind]["training"].get("with_backward") == kernel
    assert "with_backward" not in rows["exact"]["training"]
    lines = [line.strip() for line in kernels.numerics_text([rows["nvfp4"]])]
    assert lines[-1] == "with lowbit=LowBit(backward='drop_in') or 'matched': reference"


def test_sparse_and_linear_attention_get_what_explain_says():
    from allears.ops.attention import AttentionSpec, Sparsity, explain
    from allears.ops.attention.linear.call import explain_linear
    from allears.ops.attention.sparse_linear import SparseLinear, explain_sparse_linear, select_top_k
    from allears.ops.attention.sparse_linear.blocks import Geometry

    rows = {row["family"]: row for row in kernels.families_report()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 256, 2, 128, dtype=torch.bfloat16, device=device)
    blocks = select_top_k(torch.zeros(1, 2, 2, 4, device=device), 0.5, geometry=Geometry(256, 256, 128, 64, False))
    for precision in ("exact", "int8_fp8"):
        how = SparseLinear(precision=precision)
        wanted = explain_sparse_linear(q, q, q, blocks, torch.full((2, 1), 0.5, device=device), how)
        found = rows[f"sparse-linear, {precision}"]["inference"]
        assert (found["kernel"], found["refused"]) == (wanted.kernel, wanted.refused)
        wanted = explain(q, q, q, AttentionSpec(numerics=precision, sparse=Sparsity(keep=0.5)))
        assert rows[f"sparse, no training, {precision}"]["inference"]["kernel"] == wanted.kernel
    assert rows["sparse, no training, int8_fp8"]["training"]["kernel"] is None
    assert rows["sparse-linear, exact"]["training"]["kernel"]
    assert rows["linear"]["inference"]["kernel"] == explain_linear(q, q, q).kernel


def test_families_of_a_broken_room_are_shown_not_raised(monkeypatch):
    import allears.ops.attention.linear.call as linear

    monkeypatch.delattr(linear, "explain_linear")
    (row,) = kernels.families_report()
    assert row["inference"]["kernel"] is None and "explain_linear" in row["inference"]["refused"]["all"]
    assert any("explain_linear" in line for line in kernels.numerics_text([row], "family"))
