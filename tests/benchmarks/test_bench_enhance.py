import json

import numpy as np
import pytest
from benchmarks.clips import from_folder
from benchmarks.enhance import EnhanceCase, check_alignment

from benchmarks import registry


def missing():
    raise registry.NotInstalledError("no weights here")


def failing():
    def enhance(audio):
        if abs(audio[0] - enhance.first) < 1e-9:
            raise RuntimeError("out of luck")
        return audio

    enhance.first = 9.0
    return enhance


@pytest.fixture
def systems(monkeypatch):
    """Only ``noisy`` and three made-up systems."""
    registry.load_all()
    table = {
        "noisy": registry.SYSTEMS["enhance"]["noisy"],
        "half": registry.System("half", lambda: lambda audio: 0.5 * audio, (), "half as loud"),
        "absent": registry.System("absent", missing, (), ""),
        "failing": registry.System("failing", failing, (), "fails on one clip"),
    }
    monkeypatch.setitem(registry.SYSTEMS, "enhance", table)
    return table


def test_all_systems_all_clips_one_result_file(systems, clip_folder, tmp_path, monkeypatch):
    unlucky = list(from_folder(clip_folder))[1].noisy[0]
    monkeypatch.setattr("benchmarks.enhance.check_alignment", lambda name, enhance, clean: set_first(enhance, unlucky))
    case = EnhanceCase(
        clip_folder, metrics=("si_sdr_db",), workers=1, out=tmp_path / "csv", results_folder=tmp_path / "json"
    )
    assert case.run() == 0
    document = json.loads((tmp_path / "json" / "enhance.json").read_text())
    found = {(r["case"], r["system"], r["metric"]): r for r in document["rows"]}
    assert found["test", "noisy", "si_sdr_db"]["value"] == pytest.approx(6, abs=0.3)
    assert found["test", "half", "si_sdr_db_gain"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["test", "failing", "si_sdr_db"]["n"] == 2
    assert [found[c, "noisy", "si_sdr_db"]["n"] for c in ("test", "dry", "reverberant")] == [3, 2, 1]
    notes = "\n".join(document["notes"])
    assert "absent: MISSING: no weights here" in notes and "failing on clip1: failed: RuntimeError" in notes
    assert len((tmp_path / "csv" / "enhance.csv").read_text().splitlines()) == 1 + 3 * 3


def set_first(enhance, value):
    if hasattr(enhance, "first"):
        enhance.first = value
    return 0


def test_a_late_system_is_refused():
    clean = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    assert check_alignment("prompt", lambda x: 0.5 * x, clean) == 0
    with pytest.raises(ValueError, match="late: comes 320 samples late"):
        check_alignment("late", lambda x: np.roll(x, 320), clean)
    with pytest.raises(ValueError, match="short: returned"):
        check_alignment("short", lambda x: x[1:], clean)


def test_folder_keeps_samples_and_facts(clip_folder):
    clips = list(from_folder(clip_folder))
    assert [clip.id for clip in clips] == ["clip0", "clip1", "clip2"]
    assert [clip.facts["reverberant"] for clip in clips] == [False, False, True]
    voice = 0.1 * np.random.default_rng(0).standard_normal(8000)
    np.testing.assert_allclose(clips[0].reference, voice, atol=2e-5)


def test_a_manifest_needs_a_corpus_and_a_folder_needs_clips(systems, tmp_path):
    with pytest.raises(ValueError, match="corpus: a manifest renders"):
        EnhanceCase(tmp_path / "test.jsonl").run()
    with pytest.raises(ValueError, match=r"holds no noisy/\*.wav"):
        EnhanceCase(tmp_path).run()
