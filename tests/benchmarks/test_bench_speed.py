import json

import numpy as np
import pytest
import soundfile as sf
from benchmarks.enhance_speed import EnhanceSpeedCase
from benchmarks.speed import write_recording

from benchmarks import registry


def test_recording_repeats_its_source_to_the_length(tmp_path):
    unit = np.round(np.linspace(-0.5, 0.5, 7000) * 32768).astype(np.float32) / 32768
    sf.write(tmp_path / "unit.wav", unit, 16_000, "PCM_16")
    write_recording(tmp_path / "long.wav", 2, tmp_path / "unit.wav")
    audio, rate = sf.read(tmp_path / "long.wav", dtype="float32")
    assert rate == 16_000 and len(audio) == 32_000
    np.testing.assert_array_equal(audio, np.resize(unit, 32_000))
    sf.write(tmp_path / "wide.wav", unit, 48_000)
    with pytest.raises(ValueError, match="must be mono and 16000 Hz"):
        write_recording(tmp_path / "x.wav", 1, tmp_path / "wide.wav")


def test_measures_in_a_process_of_its_own_and_reports_who_is_missing(tmp_path, monkeypatch):
    registry.load_all()
    absent = registry.System("absent", lambda: None, ("no-such-package",), "")
    monkeypatch.setitem(registry.SYSTEMS["enhance"], "absent", absent)
    case = EnhanceSpeedCase(seconds=(1, 30), systems=("noisy", "absent"), results_folder=tmp_path)
    assert case.run() == 0
    document = json.loads((tmp_path / "enhance_speed.json").read_text())
    found = {(r["case"], r["system"], r["metric"]): r["value"] for r in document["rows"]}
    assert set(found) == {(c, "noisy", m) for c in ("1s", "30s") for m in ("rtf", "peak_rss_gb")}
    assert 0 < found["30s", "noisy", "rtf"] < 0.5
    assert 0.02 < found["1s", "noisy", "peak_rss_gb"] < 2
    assert sum("absent" in note and "FAILED: not installed: no-such-package" in note for note in document["notes"]) == 2


def test_a_peer_over_the_limit_is_stopped_and_reported(tmp_path):
    case = EnhanceSpeedCase(seconds=(1,), systems=("noisy",), limit_s=0.01, results_folder=tmp_path)
    case.run()
    document = json.loads((tmp_path / "enhance_speed.json").read_text())
    assert document["rows"] == [] and "took more than" in " ".join(document["notes"])
