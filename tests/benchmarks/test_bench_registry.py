import pytest

from benchmarks import registry


def test_every_case_and_peer_is_registered():
    registry.load_all()
    assert set(registry.CASES) >= {"enhance", "enhance_speed"}
    assert set(registry.SYSTEMS["enhance"]) == {"noisy", "allears", "rnnoise", "nsnet2", "deepfilternet3"}


def test_a_system_is_a_decorated_function(monkeypatch):
    monkeypatch.setitem(registry.SYSTEMS, "hum", {})

    @registry.system("hum", needs=("numpy",), about="doubles")
    def double(factor=2):
        return lambda x: factor * x

    (found,) = registry.systems_for("hum")
    assert found.load()(3) == 6 and found.load(factor=5)(3) == 15
    assert found.missing() == [] and list(found.versions()) == ["numpy"]


def test_a_missing_package_is_reported_with_the_fix():
    system = registry.System("x", lambda: None, ("no-such-package", "numpy"), "")
    assert system.missing() == ["no-such-package"]
    with pytest.raises(registry.NotInstalledError, match=r"no-such-package not installed .*requirements-peers.txt"):
        system.load()


def test_an_unknown_system_is_named():
    with pytest.raises(ValueError, match=r"'dolby' is unknown for enhance; known are .*rnnoise"):
        registry.systems_for("enhance", ("noisy", "dolby"))


def test_order_is_the_callers():
    assert [s.name for s in registry.systems_for("enhance", ("rnnoise", "noisy"))] == ["rnnoise", "noisy"]
