import json

import pytest
import torch
from torch import nn

from allears.core.errors import WeightsError
from allears.core.weights import check_keys, load_weights, save_weights, weight_paths


def small_state():
    generator = torch.Generator().manual_seed(1)
    return {"layer.weight": torch.randn(3, 4, generator=generator), "count": torch.tensor([2**40, -3])}


def test_round_trip_keeps_float16_values_integers_and_config(tmp_path):
    state = small_state()
    save_weights(tmp_path / "deep" / "net-v0.1", state, {"width": 4, "sha256": "stale"})
    loaded, record = load_weights(tmp_path / "deep" / "net-v0.1")
    assert loaded["layer.weight"].dtype == torch.float32
    assert torch.equal(loaded["layer.weight"], state["layer.weight"].half().float())
    assert torch.equal(loaded["count"], state["count"])
    assert record["width"] == 4 and record["dtype"] == "float16" and len(record["sha256"]) == 64
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["net-v0.1.json", "net-v0.1.safetensors"]


def test_dtype_none_keeps_every_bit_and_shared_tensors(tmp_path):
    base = torch.randn(4, 6, dtype=torch.float64)
    state = {"a": base, "view": base.T, "b": base[0].bfloat16(), "flag": torch.tensor(True), "none": torch.zeros(0, 2)}
    save_weights(tmp_path / "x", state, {}, dtype=None)
    loaded, _ = load_weights(tmp_path / "x", dtype=None)
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


def test_stem_may_carry_either_suffix(tmp_path):
    save_weights(tmp_path / "x.safetensors", small_state(), {})
    assert weight_paths(tmp_path / "x.json") == (tmp_path / "x.safetensors", tmp_path / "x.json")
    assert "count" in load_weights(tmp_path / "x.json")[0]


def test_value_too_large_for_float16_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(WeightsError, match=r"'big'.*7e\+04.*float32"):
        save_weights(tmp_path / "x", {"big": torch.tensor([7e4])}, {})
    assert list(tmp_path.iterdir()) == []


def test_config_that_json_cannot_hold_leaves_the_old_pair(tmp_path):
    save_weights(tmp_path / "x", small_state(), {"run": 1})
    with pytest.raises(TypeError):
        save_weights(tmp_path / "x", small_state(), {"run": object()})
    assert load_weights(tmp_path / "x")[1]["run"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_files(tmp_path):
    with pytest.raises(WeightsError, match=r"x\.safetensors.*no such file"):
        load_weights(tmp_path / "x")
    save_weights(tmp_path / "x", small_state(), {})
    (tmp_path / "x.json").unlink()
    with pytest.raises(WeightsError, match=r"x\.json.*no such file"):
        load_weights(tmp_path / "x")


def test_truncated_changed_and_foreign_files(tmp_path):
    path = save_weights(tmp_path / "x", small_state(), {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(WeightsError, match=f"{len(whole) - 5} bytes where {len(whole)}"):
        load_weights(tmp_path / "x")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match="sha256"):
        load_weights(tmp_path / "x")
    path.write_bytes(b"not tensors")
    import hashlib

    record = {"sha256": hashlib.sha256(b"not tensors").hexdigest()}
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_weights(tmp_path / "x")


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ("[1]", "JSON object"), ("{}", "records no 'sha256'")])
def test_bad_sidecar(tmp_path, text, says):
    save_weights(tmp_path / "x", small_state(), {})
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(WeightsError, match=says):
        load_weights(tmp_path / "x")


def test_check_keys_names_missing_unknown_and_wrong_shapes():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    check_keys(model, model.state_dict())
    state = model.state_dict()
    state["extra"] = state.pop("0.bias")
    state["1.weight"] = torch.zeros(1, 4)
    with pytest.raises(
        WeightsError, match=r"missing 0\.bias; unknown extra; wrong shape: 1\.weight is \(1, 4\), wanted \(1, 3\)"
    ):
        check_keys(model, state)
