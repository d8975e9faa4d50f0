"""The separator on files: a file a talker, whole or not there; and the files it is loaded from."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from tests.models.split_nets import RATE_HZ, GainNet, SplitNet, mix, speech

from allears.core.config import to_dict
from allears.core.errors import AudioFileError, WeightsError
from allears.core.weights import save_weights
from allears.models.separate import PRESETS, Separator
from allears.models.separate.config import SepReformerSize
from allears.models.separate.model import SeparateNet, export_state

SMALL = replace(
    PRESETS["test"],
    sepreformer=SepReformerSize(16, 2, kernel=32, stride=16, features=32, heads=2),
    sample_rate_hz=RATE_HZ,
)


def talk(path, count=2, seconds=3.0, talkers=3, rate=RATE_HZ):
    """A recording of so many who begin one after another; the sources (J, S) of it."""
    sources = speech(talkers, seconds, seed=count)
    for index in range(talkers):
        sources[index, : round(0.4 * (count - index) * RATE_HZ)] = 0
    sources[count:] = 0
    soundfile.write(path, mix(sources), rate, subtype="FLOAT")
    return sources


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(path) -> np.ndarray:
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_talker_gets_a_file_in_the_order_of_speaking(tmp_path, count):
    sources = talk(tmp_path / "a.wav", count, seconds=47.0)
    events = []
    result = Separator(SplitNet(3), "cpu").process_file(tmp_path / "a.wav", tmp_path / "out", on_progress=events.append)
    wanted = [f"a-talker-{number}.wav" for number in range(1, count + 1)]
    assert names(tmp_path / "out") == wanted and [path.name for path in result.files] == wanted
    assert (result.count, result.frames, result.sample_rate_hz) == (count, 47 * RATE_HZ, RATE_HZ)
    assert result.duration_s == 47.0 and result.rtf == result.elapsed_s / 47.0
    assert len(result.levels_db) == len(result.spans) == count
    for path, source in zip(result.files, sources[:count][::-1], strict=True):  # the last one begins first
        np.testing.assert_allclose(content(path), source, atol=1e-6)
    done = [event.done for event in events]
    assert done == sorted(done) and done[-1] == events[-1].total == 47.0 and len(set(done)) == 3


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype", "bits", "seconds"),
    [
        ("a.wav", 16_000, 1, "PCM_16", 16, 31.3),  # two windows
        ("a.flac", 44_100, 2, "PCM_24", 24, 0.6),
        ("a.wav", 8_000, 8, "PCM_24", 24, 0.6),
        ("a.wav", 96_000, 1, "FLOAT", 24, 1.6),  # more than one block
    ],
)
def test_a_file_gets_what_a_waveform_gets(tmp_path, name, rate, channels, subtype, bits, seconds):
    x = 0.2 * np.random.default_rng(0).standard_normal((int(seconds * rate), channels))
    soundfile.write(tmp_path / name, x, rate, subtype=subtype)
    x = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)[0].T
    separator = Separator(GainNet(0.75, 0.25), "cpu")
    result = separator.process_file(tmp_path / name, tmp_path)
    expected = separator(x, rate)
    for path, row in zip(result.files, expected.talkers, strict=True):
        written = soundfile.info(path)
        assert (written.samplerate, written.channels, written.frames) == (rate, 1, x.shape[1])
        assert (written.format, written.subtype) == ("WAV", subtype)
        np.testing.assert_allclose(content(path), row, atol=0.51 / 2 ** (bits - 1) + 2e-6)
    assert (result.count, result.spans) == (expected.count, expected.spans)
    np.testing.assert_allclose(result.levels_db, expected.levels_db, atol=1e-3)


def test_silence_gives_one_silent_file_and_no_talker(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((5000, 2)), 44_100)
    result = Separator(SplitNet(3), "cpu").process_file(tmp_path / "a.wav", tmp_path / "out")
    assert result.count == 0 and names(tmp_path / "out") == ["a-talker-1.wav"]
    assert content(result.files[0]).shape == (5000,) and not content(result.files[0]).any()


def test_the_caller_may_know_better(tmp_path):
    talk(tmp_path / "a.wav", count=2)
    separator = Separator(SplitNet(3), "cpu")
    assert len(separator.process_file(tmp_path / "a.wav", tmp_path, name="b", talkers=1).files) == 1
    told = separator.process_file(tmp_path / "a.wav", tmp_path, name="c", talkers=3)
    every = separator.process_file(tmp_path / "a.wav", tmp_path, name="d", all_outputs=True)
    assert (told.count, every.count) == (3, 2)
    wanted = ["a.wav", "b-talker-1.wav", *(f"{name}-talker-{n}.wav" for name in "cd" for n in (1, 2, 3))]
    assert names(tmp_path) == wanted
    assert not content(tmp_path / "d-talker-3.wav").any()


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path):
    talk(tmp_path / "a1.wav", count=2)
    for name in ("a1-talker-1.wav", "a1-talker-3.wav", "a1-talker-12.wav", "a11-talker-1.wav", "a1-talker-0.wav"):
        (tmp_path / name).write_bytes(b"earlier")
    Separator(SplitNet(3), "cpu").process_file(tmp_path / "a1.wav", tmp_path)
    assert names(tmp_path) == ["a1-talker-0.wav", "a1-talker-1.wav", "a1-talker-2.wav", "a1.wav", "a11-talker-1.wav"]
    assert content(tmp_path / "a1-talker-1.wav").any() and (tmp_path / "a11-talker-1.wav").read_bytes() == b"earlier"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("seconds", [1.0, 40.0])
def test_an_aborted_file_leaves_nothing_and_what_stood_there(tmp_path, error, seconds):
    talk(tmp_path / "a.wav", seconds=seconds)
    (tmp_path / "a-talker-3.wav").write_bytes(b"earlier")

    def stop(event):
        raise error

    with pytest.raises(error):
        Separator(SplitNet(3), "cpu").process_file(tmp_path / "a.wav", tmp_path, on_progress=stop)
    assert names(tmp_path) == ["a-talker-3.wav", "a.wav"]
    assert (tmp_path / "a-talker-3.wav").read_bytes() == b"earlier"


def test_the_first_file_comes_last(tmp_path, monkeypatch):
    """Where it stands the others do: by it a later run knows that the input is finished."""
    talk(tmp_path / "a.wav", count=3)
    (tmp_path / "a-talker-1.wav").write_bytes(b"earlier")
    real, moved = os.replace, []

    def replace(source, target):
        if os.path.basename(target).startswith("a-talker"):
            moved.append(os.path.basename(target))
            if len(moved) == 3:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        Separator(SplitNet(3), "cpu").process_file(tmp_path / "a.wav", tmp_path)
    assert moved == ["a-talker-3.wav", "a-talker-2.wav", "a-talker-1.wav"]
    assert names(tmp_path) == ["a-talker-2.wav", "a-talker-3.wav", "a.wav"]


def test_bad_files_and_options_leave_nothing(tmp_path):
    separator = Separator(SplitNet(2), "cpu")
    x = np.full(9000, 0.1, np.float32)
    soundfile.write(tmp_path / "a.wav", x, RATE_HZ)
    x[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", x, RATE_HZ, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", x[:5000], 2_000)
    (tmp_path / "text.wav").write_text("this is text, not sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", x[:0], RATE_HZ)
    before = names(tmp_path)
    for name, options, message in (
        ("nan", {}, "sample 5000 is NaN"),
        ("slow", {}, "sample_rate_hz: 2000 given"),
        ("text", {}, r"text\.wav: (holds no audio|FFmpeg cannot read it)"),
        ("empty", {}, "is empty"),
        ("none", {}, "holds no samples"),
        ("missing", {}, "no such file"),
        ("a", {"talkers": 3}, "talkers: 3 given; custom tells 1 to 2 apart"),
        ("a", {"talkers": 0}, "talkers: 0 given"),
        ("a", {"one_pass_s": 5}, "one_pass_s: 5 given"),
        ("a", {"name": "../b"}, r"name: '../b' given"),
        ("a", {"name": ""}, "name: '' given"),
    ):
        with pytest.raises(ValueError, match=message):
            separator.process_file(tmp_path / f"{name}.wav", tmp_path, **options)
        assert names(tmp_path) == before


def test_what_is_in_the_way_is_told_before_any_work(tmp_path):
    separator = Separator(SplitNet(2), "cpu")
    talk(tmp_path / "a.wav", talkers=2)
    (tmp_path / "b-talker-2.wav").mkdir()
    with pytest.raises(AudioFileError, match=r"b-talker-2\.wav: is a folder"):
        separator.process_file(tmp_path / "a.wav", tmp_path, name="b")
    (tmp_path / "c-talker-1.wav").symlink_to(tmp_path / "a.wav")
    with pytest.raises(AudioFileError, match=r"c-talker-1\.wav: is the recording itself"):
        separator.process_file(tmp_path / "a.wav", tmp_path, name="c")
    with pytest.raises(AudioFileError, match=r"a\.wav: cannot write here: File exists"):
        separator.process_file(tmp_path / "a.wav", tmp_path / "a.wav")
    with pytest.raises(AudioFileError, match="cannot write here: File name too long"):
        separator.process_file(tmp_path / "a.wav", tmp_path, name="x" * 245)
    assert separator.net.windows == []
    assert names(tmp_path) == ["a.wav", "b-talker-2.wav", "c-talker-1.wav"]


def test_a_folder_without_permission_is_told(tmp_path, monkeypatch):
    import tempfile

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    talk(tmp_path / "a.wav", talkers=2)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)  # as root, no folder is without permission
    with pytest.raises(AudioFileError, match=r"out: cannot write here: Permission denied"):
        Separator(SplitNet(2), "cpu").process_file(tmp_path / "a.wav", tmp_path / "out")


@pytest.fixture
def saved(tmp_path):
    """Weights of the smallest network as a training writes them, with a count calibrated to -6 dB."""
    torch.manual_seed(0)
    net = SeparateNet(SMALL)
    record = {"model": "separate", "config": to_dict(net.config), "count_db": -6}
    save_weights(tmp_path / "weights", export_state(net), record, dtype=None)
    return tmp_path, net


def test_saved_weights_give_the_same_talkers(saved, tmp_path):
    folder, net = saved
    loaded, whole = Separator.from_pretrained(folder, "cpu"), Separator(net, "cpu", count_db=-6)
    assert (loaded.name, loaded.count_db, loaded.config, loaded.parameters) == (
        "weights",
        -6.0,
        SMALL,
        whole.parameters,
    )
    x = (0.1 * np.random.default_rng(0).standard_normal(11 * RATE_HZ)).astype(np.float32)
    expected = whole(x, RATE_HZ, one_pass_s=10)
    assert np.abs(expected.talkers).max() > 1e-4 and np.abs(np.diff(expected.talkers, axis=0)).max() > 1e-4
    np.testing.assert_array_equal(loaded(x, RATE_HZ, one_pass_s=10).talkers, expected.talkers)
    soundfile.write(tmp_path / "a.wav", x, RATE_HZ, subtype="FLOAT")
    result = loaded.process_file(tmp_path / "a.wav", tmp_path / "out", one_pass_s=10, all_outputs=True)
    for path, row in zip(result.files, expected.talkers, strict=True):
        np.testing.assert_allclose(content(path), row, atol=1e-7)


@pytest.mark.parametrize("rate", [4_000, 8_000, 44_100, 96_000])
@pytest.mark.parametrize("length", [1, 7, 12_345])
def test_the_network_takes_any_length_and_rate(saved, rate, length):
    x = (0.1 * np.random.default_rng(0).standard_normal((2, length))).astype(np.float32)
    found = Separator(saved[1], "cpu")(x, rate)
    assert found.talkers.shape == (2, length) and np.isfinite(found.talkers).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "enhance"}, "made for model 'enhance', wanted 'separate'"),
        ({"config": {"colour": 1}}, "unknown key 'colour'"),
        ({"config": {}}, "give exactly one of sepreformer and locoformer"),
        ({"count_db": "loud"}, "count_db: 'loud' is no number below 0"),
        ({"count_db": 3}, "count_db: 3 is no number below 0"),
    ],
)
def test_weights_of_another_model_are_told(saved, change, message):
    path = saved[0] / "weights.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match=message):
        Separator.from_pretrained(saved[0])


def test_unknown_weights_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"'no-such' is neither shipped weights \(.*\) nor a folder"):
        Separator.from_pretrained("no-such")
