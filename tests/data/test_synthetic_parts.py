"""What corpora of synthetic voices are made with: packages unpacked, utterances polished, voices compared."""

import debs
import numpy as np
import pytest
import soundfile as sf
from test_synthetic import voice_like

from allears.core.errors import CorpusError
from allears.data import synthetic_audio, synthetic_check
from allears.data.archives import unpack_deb
from allears.data.corpus import Item, write_manifest
from allears.data.synthetic_audio import polish
from allears.data.synthetic_check import check_voices, similarities


def test_unpacking_keeps_links_inside(tmp_path):
    files = {"usr/bin/go": b"#!/bin/sh\n", "usr/lib/a.so.1": b"lib", "usr/lib/a.so": "a.so.1", "etc/x": "/usr/lib/a.so"}
    unpack_deb(debs.make_deb(tmp_path, "good", files), tmp_path / "root")
    assert (tmp_path / "root/usr/bin/go").stat().st_mode & 0o111
    assert (tmp_path / "root/etc/x").resolve() == (tmp_path / "root/usr/lib/a.so.1").resolve()
    assert (tmp_path / "root/etc/x").read_bytes() == b"lib"
    for name in ("../out", "usr/../../out"):
        with pytest.raises(CorpusError, match="damaged"):
            unpack_deb(debs.make_deb(tmp_path, "bad", {name: b"x"}), tmp_path / "root")
    with pytest.raises(CorpusError, match="damaged"):
        unpack_deb(debs.make_deb(tmp_path, "bad", {"usr/x": "../../../etc/passwd"}), tmp_path / "root")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorpusError, match="sealed"):
        unpack_deb(debs.make_deb(tmp_path, "codec2-examples", {"x": b""}, file_name="a_1_all.deb"), tmp_path / "root")


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050])
def test_polish_trims_and_levels(rate_hz):
    voice = voice_like(3.0, 120.0, rate_hz)
    for loudness in (0.02, 0.5):
        out = polish(np.pad(loudness * voice, (rate_hz, 2 * rate_hz)), rate_hz)
        assert out.dtype == np.float32 and 3.35 <= len(out) / rate_hz <= 3.45
        middle = out[rate_hz : 2 * rate_hz]
        assert np.sqrt(np.square(middle).mean()) == pytest.approx(10 ** (-26 / 20), rel=0.1)
        assert np.abs(out).max() <= 0.95


def test_a_peak_goes_before_the_level(monkeypatch):
    monkeypatch.setattr(synthetic_audio, "PEAK", 0.05)
    assert np.abs(polish(voice_like(3.0, 120.0), 16_000)).max() == pytest.approx(0.05)


def test_polish_says_what_is_wrong():
    noise = np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
    voice = voice_like(3.0, 120.0)
    cases = {
        "broken": np.full(48_000, np.nan, np.float32),
        "silent": np.zeros(48_000, np.float32),
        "clipped": np.clip(20 * voice, -1, 1),
        "too short": voice[:24_000],
        "too long": voice_like(7.0, 120.0),
        "not voiced": 0.1 * noise,
        "dull": debs.tone(3.0, 120.0),
    }
    assert {word: polish(x, 16_000) for word, x in cases.items()} == {word: word for word in cases}
    assert polish(np.zeros(0, np.float32), 16_000) == "broken"


def corpus_of(folder, voices):
    """Four clips each of (name, pitch, tilt)."""
    items = []
    for name, pitch, tilt in voices:
        for n in range(4):
            audio = voice_like(2.5, pitch * (1 + 0.02 * n), tilt=tilt, seed=n) / 4
            path = f"{name}-{n}.flac"
            sf.write(folder / path, audio, 16_000)
            items.append(Item(f"p:{path}", "speech", "train", path, 16_000, len(audio), "p", "1", "0", path, "MIT",
                              speaker=name))  # fmt: skip
    write_manifest(folder, items)
    return folder


def test_voices_that_are_one_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_check, "find_spec", lambda name: None)
    assert synthetic_check.measure() == "mel cepstra"
    folder = corpus_of(tmp_path, [("a", 110.0, 1.4), ("b", 200.0, 0.6), ("a-again", 110.0, 1.4), ("c", 150.0, 1.0)])
    found = {report.voice: report for report in check_voices(folder)}
    assert {name for name, report in found.items() if report.alike} == {"a", "a-again"}
    assert found["a"].nearest == "a-again" and found["a"].similarity > 0.999
    assert found["b"].minutes == pytest.approx(1 / 6) and found["a"].pitch_hz == pytest.approx(113.0, rel=0.05)
    assert (found["c"].package, found["c"].licence) == ("p", "MIT")


def test_by_embeddings_a_cosine_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_check, "measure", lambda: "speaker embedding")
    folder = corpus_of(tmp_path, [("a", 100.0, 1.0), ("b", 180.0, 1.0)])
    for cosine, alike in ((0.85, False), (0.95, True)):
        turned = np.array([cosine, np.sqrt(1 - cosine**2)])

        def describe(x, rate, turned=turned):
            crossings = (np.diff(np.sign(x)) != 0).sum()
            return np.array([1.0, 0.0]) if crossings < 700 else turned

        monkeypatch.setattr(synthetic_check, "speaker_embedding", describe)
        a, b = check_voices(folder)
        assert (a.alike, b.alike) == (alike, alike) and a.own == pytest.approx(1.0)
        assert a.similarity == pytest.approx(cosine, abs=1e-6)


def test_similarities():
    near, own = similarities(np.array([[[2.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 3.0]]]))
    np.testing.assert_allclose(near, [[-1.0, 2**-0.5], [2**-0.5, -1.0]])
    np.testing.assert_allclose(own, [0.0, 1.0])


def test_one_voice_cannot_be_compared(tmp_path):
    with pytest.raises(CorpusError, match="1 speakers; at least 2"):
        check_voices(corpus_of(tmp_path, [("a", 100.0, 1.0)]))
