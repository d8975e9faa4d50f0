from dataclasses import dataclass

import pytest
import torch

from allears.core import config
from allears.core.device import matmul_precision, resolve_device
from allears.core.errors import MissingDependencyError, require


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    rate_hz: float
    inner: Inner = Inner()
    pair: tuple[int, float] = (1, 2.0)


def test_round_trip_keeps_types():
    value = Outer(16_000, Inner((3, 4, 5), "x"), (7, 1.5))
    back = config.from_json(Outer, config.to_json(value))
    assert back == value and isinstance(back.inner.sizes, tuple) and isinstance(back.rate_hz, float)
    assert config.from_dict(Outer, {"rate_hz": 1}).inner.name is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate_hz": 1, "colour": 2}, "Outer: unknown key 'colour'; known are inner, pair, rate_hz"),
        ({}, "rate_hz"),
        ({"rate_hz": "fast"}, r"Outer.rate_hz: expected float, got 'fast'"),
        ({"rate_hz": 1, "inner": {"sizes": [1], "name": 3, "x": 1}}, "Outer.inner: unknown key 'x'"),
        ({"rate_hz": 1, "inner": 4}, "Outer.inner: expected an object"),
    ],
)
def test_errors_name_the_place(values, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(Outer, values)


def test_devices_and_missing_packages():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="'toaster' is not a device"):
        resolve_device("toaster")
    with pytest.raises(MissingDependencyError, match=r"listening needs the package 'no_such_pkg'.*allears\[eval\]"):
        require("no_such_pkg.part", "eval", "listening")


def test_a_gpu_without_a_number_is_that_of_the_local_rank(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert str(resolve_device("auto")) == str(resolve_device("cuda")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(resolve_device("auto")) == str(resolve_device("cuda")) == "cuda:3"
    assert str(resolve_device("cuda:1")) == "cuda:1" and str(resolve_device("cpu")) == "cpu"


def test_a_base_with_the_fields_that_are_named():
    base, other = Outer(8.0, Inner((3,), "x")), Outer(1.0)
    assert config.overridden(base, None, "it") is base and config.overridden(base, other, "it") is other
    assert config.overridden(base, {"rate_hz": 5}, "it") == Outer(5.0, Inner((3,), "x"))
    with pytest.raises(ValueError, match="it: unknown key 'x'"):
        config.overridden(base, {"x": 1}, "it")


def test_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision()
    other = "high" if before == "highest" else "highest"

    @matmul_precision(other)
    def inside() -> str:
        return torch.get_float32_matmul_precision()

    assert inside() == inside() == other and torch.get_float32_matmul_precision() == before
    with pytest.raises(OSError), matmul_precision(other):
        raise OSError
    assert torch.get_float32_matmul_precision() == before
