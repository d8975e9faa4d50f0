import json
import os
from dataclasses import replace

import debs
import numpy as np
import pytest
import soundfile as sf

from allears.core.errors import CorpusError
from allears.data.corpus import read_manifest
from allears.data.packages import parse_packages
from allears.data.prepare import prepare
from allears.data.verify import verify

SPEECH_RULES = """rules = [
  { match = 'bad/', kind = 'skip' },
  { match = '_desc_(?P<lang>ro)\\.wav$', kind = 'speech', split = 'val', speaker = 'tux-{lang}', language = '{lang}' },
  { match = '_desc_(?P<lang>\\w\\w)\\.wav$', kind = 'speech', speaker = 'tux-{lang}', language = '{lang}' },
]"""
SOUND_RULES = """rules = [
  { match = '/music/', kind = 'music', excerpt_s = 2.0 },
  { match = '/many/', kind = 'babble', speaker = 'crowd', every = 3 },
  { match = 'Stairs.*\\.wav$', kind = 'rir', split = 'test' },
  { match = 'capped/', kind = 'sound', force = 'event', max_minutes = 0.05 },
  { match = 'data\\.pk3!sound/|/sounds/', kind = 'sound' },
]"""


def entry(name, deb, split, rules, extra=""):
    head = f'name = "{name}"\nversion = "1.0-1"\nsha256 = "{debs.sha256(deb)[:12]}"\n'
    head += f'licence = "CC0-1.0"\nsplit = "{split}"\n'
    return f"[[package]]\n{head}{extra}\n{rules}\n"


def noise(seconds, seed, rate=16_000):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


@pytest.fixture
def made(tmp_path):
    quiet = np.zeros(16_000, np.float32)
    stereo = np.stack([debs.tone(1.0, 300.0, 44_100)] * 2, 1)
    talk = {
        "usr/share/tuxpaint/stamps/a/cat_desc_ru.wav": debs.wav_bytes(np.concatenate([quiet, debs.tone(0.5), quiet])),
        "usr/share/tuxpaint/stamps/a/cat_desc_ro.wav": debs.wav_bytes(stereo, 44_100),
        "usr/share/tuxpaint/stamps/a/cat_desc_el.wav": debs.wav_bytes(debs.tone(1.0)),
        "usr/share/tuxpaint/stamps/a/dog_desc_ru.wav": debs.wav_bytes(debs.tone(0.1)),
        "usr/share/tuxpaint/stamps/a/hen_desc_ru.wav": debs.wav_bytes(quiet),
        "usr/share/tuxpaint/stamps/a/sow_desc_bg.wav": debs.wav_bytes(debs.tone(0.6, 500.0)),
        "usr/share/tuxpaint/stamps/a/sow.txt": ("A sow.\nbg.utf8=" + "Прасе " * 20 + "\n").encode(),
        "usr/share/tuxpaint/stamps/a/cow_desc_ru.wav": b"RIFF nonsense",
        "usr/share/tuxpaint/stamps/bad/cat_desc_ru.wav": debs.wav_bytes(debs.tone(1.0)),
        "usr/share/tuxpaint/stamps/a/cat.txt": "A cat.\nru.utf8=Кот.\nro.utf8=O pisică.\nel.utf8=x\n".encode(),
    }
    rain = debs.wav_bytes(noise(5.0, 1, 8000), 8000)
    sounds = {
        "usr/share/g/music/song.flac": debs.wav_bytes(noise(9.0, 2), form="FLAC"),
        "usr/share/g/sounds/Rain_Loop.wav": rain,
        "usr/share/g/sounds/DoorSlam.wav": debs.wav_bytes(noise(0.5, 3)),
        "usr/share/g/StairsL.wav": debs.wav_bytes(noise(0.5, 4, 44_100), 44_100, subtype="PCM_24"),
        "usr/share/g/data.pk3": debs.make_zip({"sound/bark.wav": debs.wav_bytes(noise(0.4, 5)), "maps/x": b"0"}),
        "usr/share/g/README": b"none",
    }
    sounds |= {f"usr/share/g/many/{i}.wav": debs.wav_bytes(noise(0.5, 10 + i)) for i in range(7)}
    sounds |= {f"usr/share/g/capped/{i}.wav": debs.wav_bytes(noise(1.0, 20 + i)) for i in range(8)}
    other = {"usr/share/o/sounds/copy_of_rain.wav": rain, "usr/share/o/sounds/own.wav": debs.wav_bytes(noise(0.5, 40))}
    folder = tmp_path / "packages"
    toml = entry("talk", debs.make_deb(folder, "talk", talk), "train", SPEECH_RULES, 'texts = "tuxpaint"')
    toml += entry("sounds", debs.make_deb(folder, "sounds", sounds), "train", SOUND_RULES)
    toml += entry("other", debs.make_deb(folder, "other", other), "test", SOUND_RULES)
    return folder, parse_packages(toml)


def test_corpus_is_what_the_packages_hold(made, tmp_path):
    packages_dir, table = made
    events = []
    items = prepare(tmp_path / "c", packages_dir, packages=table, on_progress=events.append)
    assert read_manifest(tmp_path / "c") == items and verify(tmp_path / "c") == []
    by = {item.source_path.removeprefix("usr/share/"): item for item in items}

    speech = {item.speaker: item for item in items if item.kind == "speech"}
    assert set(speech) == {"tux-ru", "tux-ro", "tux-bg"}
    assert speech["tux-bg"].text is None, "120 characters in 0.6 s"
    ru, ro = speech["tux-ru"], speech["tux-ro"]
    assert (ru.split, ru.language, ru.text, ru.licence, ru.version) == ("train", "ru", "Кот.", "CC0-1.0", "1.0-1")
    assert (ro.split, ro.text, ro.narrow_band) == ("val", "O pisică.", False)
    assert abs(ru.frames - (8000 + 640)) <= 2
    audio, rate = sf.read(tmp_path / "c" / ro.path)
    assert rate == 16_000 and audio.shape == (16_000,)
    assert np.abs(audio[400:-400] - debs.tone(1.0, 300.0)[400:-400]).max() < 2e-3
    assert ro.bandwidth_hz < 450 and ru.clipped_fraction == 0.0

    assert by["g/music/song.flac"].frames == 32_000 and by["g/music/song.flac"].kind == "music"
    rir = by["g/StairsL.wav"]
    assert (rir.kind, rir.split, rir.sample_rate_hz, rir.frames) == ("rir", "test", 44_100, 22_050)
    assert sf.info(str(tmp_path / "c" / rir.path)).subtype == "PCM_24"
    door, bark = by["g/sounds/DoorSlam.wav"], by["g/data.pk3!sound/bark.wav"]
    assert (door.kind, door.label, door.caption) == ("event", "door", "a door opening or closing")
    assert (bark.kind, bark.label) == ("event", "dog")
    assert [name for name in by if "/many/" in name] == [f"g/many/{i}.wav" for i in (0, 3, 6)]
    assert sum("capped" in name for name in by) == 3
    assert len(list((tmp_path / "c/event/sounds").glob("capped*"))) == 3

    assert "g/sounds/Rain_Loop.wav" not in by, "the copy in the test split wins"
    copy = by["o/sounds/copy_of_rain.wav"]
    assert (copy.split, copy.kind, copy.label, copy.narrow_band) == ("test", "noise", "rain", True)
    assert copy.noise_floor_db == pytest.approx(-20, abs=2)

    assert not [path for path in (tmp_path / "c").rglob("*") if "_el" in path.name or path.suffix == ".tmp"]
    assert [event.done for event in events] == [0, 1, 2, 3] and events[-1].total == 3


def test_resumes_where_it_stopped(made, tmp_path):
    packages_dir, table = made
    deb = packages_dir / "other_1.0-1_all.deb"
    whole = deb.read_bytes()
    deb.unlink()
    os.environ["PATH"], path = "", os.environ["PATH"]
    try:
        with pytest.raises(CorpusError, match=r"'other' 1\.0-1 .*cannot be downloaded.*--skip-missing"):
            prepare(tmp_path / "c", packages_dir, packages=table)
        assert not (tmp_path / "c/manifest.jsonl").exists()
        partly = prepare(tmp_path / "c", packages_dir, packages=table, skip_missing=True)
    finally:
        os.environ["PATH"] = path
    assert {item.package for item in partly} == {"talk", "sounds"}
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "c/speech").rglob("*.flac")}
    deb.write_bytes(whole)
    (packages_dir / "talk_1.0-1_all.deb").unlink()
    full = prepare(tmp_path / "c", packages_dir, packages=table)
    assert {item.package for item in full} == {"talk", "sounds", "other"}
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "c/speech").rglob("*.flac")}


def test_known_copies_and_licences_need_no_new_build(made, tmp_path):
    packages_dir, table = made
    before = prepare(tmp_path / "c", packages_dir, packages=table)
    for deb in packages_dir.iterdir():
        deb.unlink()
    table = table | {"sounds": replace(table["sounds"], copies=r"sounds/Door|!sound/bark", licence="GPL-2+")}
    after = prepare(tmp_path / "c", packages_dir, packages=table)
    gone = {item.source_path for item in before} - {item.source_path for item in after}
    assert gone == {"usr/share/g/sounds/DoorSlam.wav", "usr/share/g/data.pk3!sound/bark.wav"}
    assert {item.licence for item in after if item.package == "sounds"} == {"GPL-2+"}


def test_builds_are_reproducible(made, tmp_path):
    packages_dir, table = made
    one = prepare(tmp_path / "a", packages_dir, packages=table, workers=1)
    assert one == prepare(tmp_path / "b", packages_dir, packages=table, workers=4)


def test_wrong_checksum_is_told_or_allowed(made, tmp_path):
    packages_dir, table = made
    (packages_dir / "talk_1.0-1_all.deb").unlink()
    debs.make_deb(packages_dir, "talk", {"usr/share/x_desc_ru.wav": debs.wav_bytes(debs.tone(1.0))}, version="1.1-1")
    with pytest.raises(CorpusError, match=r"wanted 1\.0-1 .*found talk_1\.1-1.*--allow-other-versions"):
        prepare(tmp_path / "c", packages_dir, packages=table, only=["talk"])
    items = prepare(tmp_path / "c", packages_dir, packages=table, only=["talk"], allow_other_versions=True)
    assert [item.version for item in items] == ["1.1-1"]


def test_damaged_package_leaves_nothing_final(made, tmp_path):
    packages_dir, table = made
    deb = packages_dir / "talk_1.0-1_all.deb"
    deb.write_bytes(deb.read_bytes()[:-4000])
    with pytest.raises(CorpusError, match="damaged"):
        prepare(tmp_path / "c", packages_dir, packages=table, only=["talk"], allow_other_versions=True)
    assert not list((tmp_path / "c").glob(".state/*")) and not (tmp_path / "c/manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["torcs-data"]}, "'torcs-data' is sealed"),
        ({"only": ["nonesuch"]}, "nonesuch.*known are"),
        ({"kinds": ["song"]}, "kinds='song'"),
        ({"codec": "mp3"}, "codec='mp3'"),
    ],
)
def test_bad_arguments(made, tmp_path, arguments, message):
    packages_dir, table = made
    with pytest.raises(CorpusError, match=message):
        prepare(tmp_path / "c", packages_dir, packages=table, **arguments)


def test_verify_finds_what_was_changed(made, tmp_path):
    packages_dir, table = made
    items = prepare(tmp_path / "c", packages_dir, packages=table)
    speech = [item for item in items if item.kind == "speech"]
    (tmp_path / "c" / speech[0].path).unlink()
    audio, rate = sf.read(tmp_path / "c" / speech[1].path, dtype="int16")
    audio[100] ^= 1
    sf.write(tmp_path / "c" / speech[1].path, audio, rate)
    faults = verify(tmp_path / "c")
    assert (
        len(faults) == 2 and "missing" in faults[0] + faults[1] and "not those of the manifest" in faults[0] + faults[1]
    )


def test_state_is_json_of_the_items(made, tmp_path):
    packages_dir, table = made
    prepare(tmp_path / "c", packages_dir, packages=table, only=["talk"], kinds=["speech"])
    saved = json.loads((tmp_path / "c/.state/talk.json").read_text())
    assert saved["left_out"] == {"too short": 2, "unreadable": 1} and len(saved["items"]) == 3
