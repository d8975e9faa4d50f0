"""Synthetic voices, spoken by a program that plays a file."""

from dataclasses import replace
from itertools import islice

import debs
import numpy as np
import pytest
import soundfile as sf

from allears.cli.main import main
from allears.core.errors import CorpusError
from allears.data import synthetic, synthetic_engines
from allears.data.corpus import check_splits, read_manifest
from allears.data.packages import Package
from allears.data.synthetic import build_synthetic
from allears.data.synthetic_engines import ENGINES, Engine, piper_ids
from allears.data.synthetic_texts import known_languages, sentences
from allears.data.synthetic_voices import SyntheticVoice, VoiceTable, known_synthetic_voices, parse_voice_table
from allears.data.verify import verify

SCRIPT = b"""#!/bin/sh
cp "$(dirname "$0")/../share/$2.wav" "$6"
"""
"""Called as flite is: -voice NAME -t TEXT -o FILE."""


def voice_like(seconds, pitch_hz, rate_hz=16_000, tilt=1.0, seed=0):
    """Harmonics that fall by ``tilt``, in syllables of a quarter second, and a breath of noise."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    harmonics = np.arange(1, int(0.45 * rate_hz / pitch_hz))
    tone = (np.sin(2 * np.pi * pitch_hz * time[:, None] * harmonics) / harmonics**tilt).sum(1)
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.2 * (tone + 0.02 * noise) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Packages with a program and two voices, 22.05 and 8 kHz, and the table of them."""
    low = np.pad(voice_like(3.0, 100.0, 22_050), 22_050)
    high = voice_like(2.5, 220.0, 8_000, tilt=0.3)
    files = {
        "usr/bin/flite": SCRIPT,
        "usr/share/low.wav": debs.wav_bytes(low / 8, 22_050),
        "usr/share/high.wav": debs.wav_bytes(high / 8, 8_000),
        "usr/share/loud.wav": debs.wav_bytes(np.clip(20 * low, -1, 1), 22_050),
    }
    deb = debs.make_deb(tmp_path / "debs", "talker", files, version="3.1-2")
    data = debs.make_deb(tmp_path / "debs", "talker-data", {"usr/share/x": b"x"})
    packages = {
        "talker": Package("talker", "3.1-2", debs.sha256(deb), "MIT", "train"),
        "talker-data": Package("talker-data", "1.0-1", debs.sha256(data), "GPL-2+", "train"),
        "gone": Package("gone", "1", "0" * 64, "MIT", "train"),
    }
    names = [("low", "en", ()), ("high", "cs", ("talker-data",)), ("loud", "en", ()), ("lost", "en", ("gone",))]
    voices = {n: SyntheticVoice(n, "flite", n, language, needs) for n, language, needs in names}
    monkeypatch.setitem(ENGINES, "flite", replace(ENGINES["flite"], packages=("talker",)))
    table = VoiceTable(voices, packages)
    monkeypatch.setattr(synthetic, "known_synthetic_voices", lambda: table)
    return tmp_path


def build(shop, **options):
    return build_synthetic(shop / "c", shop / "debs", **({"minutes": 0.2} | options))


def test_the_manifest_says_what_was_spoken(shop, caplog):
    items = build(shop)
    assert read_manifest(shop / "c") == items and not check_splits(items) and not verify(shop / "c")
    assert [i.speaker for i in items] == ["low"] * 4 + ["high"] * 5
    assert all((i.kind, i.split, i.sample_rate_hz) == ("speech", "train", 16_000) for i in items)
    low, high = items[0], items[-1]
    assert (low.package, low.version, low.licence, low.language) == ("talker", "3.1-2", "MIT", "en")
    assert (high.package, high.version, high.licence, high.language) == ("talker-data", "1.0-1", "GPL-2+", "cs")
    assert low.package_sha256 == debs.sha256(next((shop / "debs").glob("talker_*")))
    assert not low.narrow_band and high.narrow_band
    assert [i.text for i in items[:4]] == list(islice(sentences("en", "0/low"), 4))
    audio, rate = sf.read(shop / "c" / low.path)
    assert rate == 16_000 and 3.2 <= len(audio) / rate == low.seconds <= 3.6  # a second of silence went at each end
    assert np.sqrt(np.square(audio[8000:40_000]).mean()) == pytest.approx(10 ** (-26 / 20), rel=0.1)
    # What cannot be had or used is named.
    assert "left out loud" in caplog.text and "clipped" in caplog.text
    assert "left out lost" in caplog.text and "gone" in caplog.text
    assert not (shop / "c/.programs").exists()


def silent_engine(*_):
    raise AssertionError("spoken again")


def test_an_interrupted_build_goes_on(shop, monkeypatch):
    whole = build(shop)
    (shop / "c").rename(shop / "whole")
    first = ENGINES["flite"]

    def until_the_second(voice, root, texts):
        if voice.name == "high":
            raise KeyboardInterrupt
        return first.speak(voice, root, texts)

    monkeypatch.setitem(ENGINES, "flite", replace(first, speak=until_the_second))
    with pytest.raises(KeyboardInterrupt):
        build(shop, only=("low", "high"))
    assert not (shop / "c/manifest.jsonl").exists()

    def only_the_second(voice, root, texts):
        assert voice.name == "high"
        return first.speak(voice, root, texts)

    monkeypatch.setitem(ENGINES, "flite", replace(first, speak=only_the_second))
    assert build(shop, only=("low", "high")) == whole
    monkeypatch.setitem(ENGINES, "flite", replace(first, speak=silent_engine))
    assert build(shop, only=("low", "high")) == whole
    with pytest.raises(AssertionError, match="spoken again"):  # another seed is another corpus
        build(shop, only=("low",), seed=1)


def test_clear_errors(shop, small_corpus, monkeypatch):
    with pytest.raises(CorpusError, match=r"only='nobody': no such voice; known are high, lost, loud, low"):
        build(shop, only=("nobody",))
    with pytest.raises(CorpusError, match="minutes=0: wanted more than 0"):
        build(shop, minutes=0.0)
    with pytest.raises(CorpusError, match="none of the 1 voices can be had"):
        build(shop, only=("lost",))
    before = (small_corpus / "manifest.jsonl").read_bytes()
    with pytest.raises(CorpusError, match="holds another corpus"):
        build_synthetic(small_corpus, shop / "debs")
    assert (small_corpus / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (b"#!/bin/sh\necho no such voice >&2\nexit 3\n", r"flite failed \(status 3\): no such voice"),
        (b"\x7fELFxx", "flite cannot be run"),
    ],
)
def test_programs_that_fail(tmp_path, script, said):
    program = tmp_path / "usr/bin/flite"
    program.parent.mkdir(parents=True)
    program.write_bytes(script)
    program.chmod(0o755)
    with pytest.raises(CorpusError, match=said):
        ENGINES["flite"].speak(SyntheticVoice("a", "flite", "a", "en"), tmp_path, ["one"])


def test_a_python_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(synthetic_engines, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match="'hibari-tts' and 'onnxruntime' are needed: pip install"):
        ENGINES["hibari"].installed()
    lost = Engine(silent_engine, (), "x", "json", "voice.onnx")
    monkeypatch.setattr(synthetic_engines, "find_spec", __import__("importlib").util.find_spec)
    with pytest.raises(CorpusError, match=r"'x' holds no voice.onnx|needed: pip install"):
        lost.installed()


def test_festival_is_told_in_its_own_encoding(tmp_path, monkeypatch):
    seen = {}

    def run(root, arguments, home, folder=None):
        with open(arguments[-1], "rb") as script:
            seen["script"] = script.read()
        sf.write(f"{home}/1.wav", np.zeros(8), 16_000)
        return b""

    monkeypatch.setattr(synthetic_engines, "_run", run)
    voice = SyntheticVoice("x", "festival", "czech_ph", "cs", encoding="iso-8859-2")
    spoken = ENGINES["festival"].speak(voice, tmp_path, ['k"ů\\ň', "pes"])
    assert spoken[0] is None and len(spoken[1][0]) == 8
    text = seen["script"].decode("iso-8859-2")
    assert '"k\\"ů\\\\ň"' in text and "(voice_czech_ph)" in text and f"{tmp_path}/usr/share/festival/voices" in text


def test_the_table_that_ships():
    table = known_synthetic_voices()
    engines = [voice.engine for voice in table.voices.values()]
    assert len(engines) == 25 and set(engines) == set(ENGINES) and engines.count("espeak-ng") <= 10
    assert {package.split for package in table.packages.values()} == {"train"}
    assert all(len(package.sha256) == 16 and package.licence for package in table.packages.values())
    needed = {name for engine in ENGINES.values() for name in engine.packages}
    needed |= {name for voice in table.voices.values() for name in voice.packages}
    assert needed == set(table.packages)
    for voice in table.voices.values():
        assert voice.packages or (ENGINES[voice.engine].module and voice.licence)
        for text in islice(sentences(voice.language, voice.name), 200):
            text.encode(voice.encoding)
    with pytest.raises(CorpusError, match="package 'p' is not in the table"):
        parse_voice_table('voice = [{name="a", engine="flite", voice="a", language="en", packages=["p"]}]')
    with pytest.raises(CorpusError, match="language 'tlh'"):
        parse_voice_table('voice = [{name="a", engine="flite", voice="a", language="tlh"}]')
    with pytest.raises(CorpusError, match="voice table: "):
        parse_voice_table('voice = [{nome="a"}]')


@pytest.mark.parametrize("code", sorted(known_languages()))
def test_sentences(code):
    said = list(islice(sentences(code, "a"), 300))
    assert said == list(islice(sentences(code, "a"), 300)) != list(islice(sentences(code, "b"), 300))
    assert len(set(said)) == 300 and all(4 <= len(text.split()) <= 14 and text[-1] in ".?!" for text in said)
    language = known_languages()[code]
    spoken = {word.rstrip(",.?!") for text in said for word in text.split()}
    assert set(language.words) <= spoken  # every word comes up
    assert len(spoken - set(language.words) - set(language.small)) > 100
    with pytest.raises(CorpusError, match="language 'tlh': wanted one of"):
        sentences("tlh", "a")


def test_piper_ids():
    table = {"_": [0], "^": [1], "$": [2], "a": [14], "ʃ": [96]}
    assert piper_ids("aʃ\u0303a", table).tolist() == [1, 0, 14, 0, 96, 0, 14, 0, 2]


def test_the_verb_compares_the_voices(shop, capsys):
    arguments = ["data", "synthetic", str(shop / "c"), "--packages", str(shop / "debs"), "--minutes", "0.2"]
    assert main([*arguments, "--only", "low", "high"]) == 0
    out = capsys.readouterr().out
    assert "2 voices" in out and "low" in out and "220" in out
    assert main([*arguments, "--only", "low", "--no-check"]) == 0
    assert main([*arguments, "--only", "nobody"]) == 2
    assert "no such voice" in capsys.readouterr().err
