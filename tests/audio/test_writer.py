"""Writing: whole or not at all, exact rounding, clear errors."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile

from allears.audio import writer as writer_module
from allears.audio.files import AudioWriter, probe, read, write
from allears.core.errors import AudioFileError

RATE = 16000
NOISE = np.random.default_rng(0).uniform(-1, 1, (2, 60000)).astype(np.float32)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_blocks_of_any_size_make_one_file(tmp_path):
    with AudioWriter(tmp_path / "a.wav", RATE, 2) as out:
        for start, end in [(0, 0), (0, 1), (1, 40000), (40000, 60000)]:
            out.write(NOISE[:, start:end])
        assert names(tmp_path) == [out._temporary.name] and out._temporary.name.startswith(".")
    assert names(tmp_path) == ["a.wav"]
    np.testing.assert_array_equal(read(tmp_path / "a.wav")[0], (np.rint(NOISE * 32768) / 32768).clip(-1, 32767 / 32768))


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_U8", 8), ("PCM_16", 16), ("PCM_24", 24), ("PCM_32", 32)])
def test_integers_are_rounded_to_the_nearest_step_and_clipped(tmp_path, subtype, bits):
    x = np.concatenate([NOISE[:1, :1000], [[1.0, 1.5, -1.0, -1.5]]], axis=1).astype(np.float32)
    write(tmp_path / "a.wav", x, RATE, subtype)
    got = soundfile.read(tmp_path / "a.wav", dtype="float64")[0]
    step = 2.0 ** (1 - bits)
    np.testing.assert_allclose(got, x[0].astype(np.float64).clip(-1, 1 - step), atol=step / 2 * (1 + 1e-9), rtol=0)
    assert abs((got[:1000] - x[0, :1000]).mean()) < step / 10  # no shift


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_and_spares_what_was_there(tmp_path, error):
    (tmp_path / "old.wav").write_bytes(b"old")
    for name in ("new.wav", "old.wav"):
        with pytest.raises(error), AudioWriter(tmp_path / name, RATE, 2) as out:
            out.write(NOISE)
            raise error
    assert names(tmp_path) == ["old.wav"]
    assert (tmp_path / "old.wav").read_bytes() == b"old"


def test_a_success_replaces_what_was_there_also_behind_a_link(tmp_path):
    (tmp_path / "real.wav").write_bytes(b"old")
    (tmp_path / "link.wav").symlink_to(tmp_path / "real.wav")
    write(tmp_path / "link.wav", NOISE, RATE)
    assert (tmp_path / "link.wav").is_symlink()
    assert probe(tmp_path / "real.wav").frames == 60000


def test_the_input_can_be_the_output(tmp_path):
    write(tmp_path / "a.wav", NOISE, RATE, "FLOAT")
    with writer_module.AudioWriter(tmp_path / "a.wav", RATE, 2, "FLOAT") as out:
        out.write(read(tmp_path / "a.wav")[0] * 0.5)
    np.testing.assert_array_equal(read(tmp_path / "a.wav")[0], NOISE * 0.5)


def test_an_interrupted_process_leaves_nothing(tmp_path):
    code = f"""
        import numpy as np, signal, sys
        from allears.audio.files import AudioWriter
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
        out = AudioWriter({str(tmp_path / "a.wav")!r}, 16000, 1)  # not even a with block
        print("ready", flush=True)
        while True:
            out.write(np.zeros((1, 100), np.float32))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.wait(20)
    process.stdout.close()
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".opus"])
@pytest.mark.parametrize("limit", [0, 5000, 20000])
def test_a_disk_that_fills_is_told_and_leaves_nothing(tmp_path, suffix, limit):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the system refuses writes beyond, as a full disk does
    try:
        with pytest.raises(AudioFileError) as raised:
            write(tmp_path / f"a{suffix}", NOISE, RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(raised.value).startswith(f"{tmp_path / 'a'}{suffix}: cannot")
    assert os.strerror(errno.EFBIG) in str(raised.value)
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left_is_the_reason_given(tmp_path):
    os.symlink("/dev/full", tmp_path / "full")
    reason = writer_module._reason(tmp_path / "full", soundfile.LibsndfileError(2))
    assert reason == "No space left on device"


def test_an_error_while_closing_leaves_nothing(tmp_path, monkeypatch):
    out = AudioWriter(tmp_path / "a.wav", RATE, 2)
    out.write(NOISE)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AudioFileError, match="No space left"):
        out.close()
    assert names(tmp_path) == []
    out.close()  # over: does nothing


def test_frames_that_did_not_arrive_are_noticed(tmp_path):
    out = AudioWriter(tmp_path / "a.wav", RATE, 2)
    out.write(NOISE)
    out.frames += 1
    with pytest.raises(AudioFileError, match="60000 of 60001 frames"):
        out.close()
    assert names(tmp_path) == []


def test_a_folder_without_write_permission(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may write everywhere
    with pytest.raises(AudioFileError, match="cannot write here: Permission denied"):
        AudioWriter(tmp_path / "a.wav", RATE, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("none/a.wav", RATE, 1), "does not exist; make it first"),
        (("a.xyz", RATE, 1), "'.xyz', which cannot be written; use one of .wav"),
        (("a", RATE, 1), "use one of .wav"),
        (("folder.wav", RATE, 1), "is a folder"),
        (("a.opus", 44100, 1), "Opus holds only 8000, 12000, 16000, 24000, 48000 Hz, not 44100"),
        (("a.flac", RATE, 9), "FLAC holds 1 to 8 channels, not 9"),
        (("a.mp3", RATE, 3), "MP3 holds 1 to 2 channels, not 3"),
        (("a.mp3", 96000, 1), "only supports sample rates"),
        (("a.wav", 0, 1), "sample_rate_hz is 0"),
        (("a.wav", RATE, 1, "VORBIS"), "WAV takes no subtype 'VORBIS'; use one of PCM_16"),
    ],
)
def test_what_cannot_be_written_is_told_at_once(tmp_path, values, words):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioFileError) as raised:
        AudioWriter(tmp_path / values[0], *values[1:])
    assert words in str(raised.value) and ".part" not in str(raised.value)
    assert names(tmp_path) == ["folder.wav"]


def test_bad_blocks_are_refused(tmp_path):
    with AudioWriter(tmp_path / "a.wav", RATE, 2) as out:
        with pytest.raises(ValueError, match=r"^x: got shape \(1, 5\), wanted \(C, n\) with C = 2"):
            out.write(np.zeros((1, 5), np.float32))
        with pytest.raises(ValueError, match=r"^x: holds NaN"):
            out.write(np.full((2, 5), np.nan, np.float32))
        out.write(NOISE)
    with pytest.raises(ValueError, match="closed"):
        out.write(NOISE)
    assert probe(tmp_path / "a.wav").frames == 60000


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(AudioFileError, match="no samples were written"):
        write(tmp_path / "a.wav", np.zeros((1, 0), np.float32), RATE)
    assert names(tmp_path) == []


def test_a_long_wav_becomes_rf64(tmp_path, monkeypatch):
    with AudioWriter(tmp_path / "a.wav", RATE, 2, "PCM_24", expected_frames=800_000_000) as out:
        out.write(NOISE)
    assert probe(tmp_path / "a.wav").container == "RF64"
    np.testing.assert_allclose(read(tmp_path / "a.wav")[0], NOISE, atol=2**-23)
    with AudioWriter(tmp_path / "b.wav", RATE, 2, expected_frames=60000) as out:
        out.write(NOISE)
    assert probe(tmp_path / "b.wav").container == "WAV"

    monkeypatch.setattr(writer_module, "WAV_LIMIT_BYTES", 200_000)
    out = AudioWriter(tmp_path / "c.wav", RATE, 2)
    out.write(NOISE[:, :50000])
    with pytest.raises(AudioFileError, match="pass expected_frames"):
        out.write(NOISE[:, 50000:])
    assert names(tmp_path) == ["a.wav", "b.wav"]


def test_long_names_and_odd_ones(tmp_path):
    for name in ("x" * 251 + ".wav", "é" * 120 + ".flac", "a b'\"$;.wav", "-o.wav"):
        write(tmp_path / name, NOISE, RATE)
        assert probe(tmp_path / name).frames == 60000
