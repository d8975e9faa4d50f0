"""Reading sound files: every container, exact samples, clear errors."""

import importlib.util
import os

import numpy as np
import pytest
import soundfile

from allears.audio import files, media
from allears.audio.files import AudioInfo, AudioReader, matching_subtype, probe, read, write
from allears.core.errors import AudioFileError, MissingDependencyError

RATE = 16000
TONE = np.stack([np.sin(np.arange(20001) / 9), 0.5 * np.sin(np.arange(20001) / 5)]).astype(np.float32) * 0.7


@pytest.fixture
def no_ffmpeg(monkeypatch):
    monkeypatch.setattr(files, "have_ffmpeg", lambda: False)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff", ".au", ".caf", ".w64", ".rf64"])
def test_lossless_containers_give_the_samples_back(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, TONE, 44100)
    samples, rate = read(path)
    assert rate == 44100 and samples.dtype == np.float32
    np.testing.assert_array_equal(samples, np.rint(TONE * 32768) / 32768)
    info = probe(path)
    assert (info.sample_rate_hz, info.channels, info.frames, info.subtype) == (44100, 2, 20001, "PCM_16")
    assert info.duration_s == pytest.approx(20001 / 44100)


@pytest.mark.parametrize("suffix", [".ogg", ".opus", ".mp3"])
def test_lossy_containers_keep_length_rate_and_sound(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, TONE, 48000)
    samples, rate = read(path)
    assert rate == 48000 and samples.shape == TONE.shape
    error = (samples - TONE)[:, 2000:-2000]
    assert 10 * np.log10((error**2).mean() / (TONE**2).mean()) < -15


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 96000])
@pytest.mark.parametrize("channels", [1, 8])
def test_any_rate_and_channel_count(tmp_path, rate, channels):
    x = np.random.default_rng(0).integers(-32768, 32768, (channels, 100)).astype(np.float32) / 32768
    write(tmp_path / "a.flac", x, rate)
    samples, got = read(tmp_path / "a.flac")
    assert got == rate
    np.testing.assert_array_equal(samples, x)


def test_float_files_keep_values_outside_full_scale(tmp_path):
    soundfile.write(tmp_path / "a.wav", TONE.T * 3, RATE, "FLOAT")
    np.testing.assert_array_equal(read(tmp_path / "a.wav")[0], TONE * 3)


@pytest.mark.parametrize("block", [1000, 20001, 65536])
def test_blocks_put_together_are_the_file(tmp_path, block):
    write(tmp_path / "a.wav", TONE, RATE)
    with AudioReader(tmp_path / "a.wav", block) as reader:
        blocks = list(reader)
    assert {part.shape[1] for part in blocks[:-1]} <= {block}
    assert blocks[-1].shape[1] <= block
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), read(tmp_path / "a.wav")[0])


def test_one_sample_is_a_file(tmp_path):
    write(tmp_path / "a.wav", np.full((1, 1), 0.5, np.float32), RATE)
    np.testing.assert_array_equal(read(tmp_path / "a.wav")[0], [[0.5]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused_or_zeroed(tmp_path, caplog, bad):
    x = TONE.T.copy()
    x[[7, 12000], 1] = bad
    soundfile.write(tmp_path / "a.wav", x, RATE, "FLOAT")
    with pytest.raises(AudioFileError, match=r"a\.wav: sample 7 is NaN or infinite"):
        read(tmp_path / "a.wav")
    with AudioReader(tmp_path / "a.wav", 5000, on_nonfinite="zero") as reader:
        got = np.concatenate(list(reader), axis=1)
    np.testing.assert_array_equal(got, np.nan_to_num(x.T, nan=0, posinf=0, neginf=0))
    assert "2 samples were NaN or infinite" in caplog.text


def test_a_file_that_ends_early_is_read_up_to_there(tmp_path, caplog):
    write(tmp_path / "a.flac", TONE, RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    try:
        samples, _ = read(tmp_path / "a.flac")
    except AudioFileError as error:
        assert "damaged" in str(error)
    else:
        assert 1000 < samples.shape[1] < 20001
        assert "ends early" in caplog.text


def text_file(path):
    path.write_text("This is no sound. " * 200)


def no_frames(path):
    soundfile.write(path, np.zeros((0, 1)), RATE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (text_file, "no audio"),
        (lambda path: path.touch(), "empty (0 bytes)"),
        (no_frames, "no samples (0 frames)"),
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
    ],
)
@pytest.mark.parametrize("open_it", [read, probe, AudioReader])
def test_what_is_no_sound_file_is_told_as_it_is(tmp_path, no_ffmpeg, make, words, open_it):
    path = tmp_path / "a.wav"
    make(path)
    with pytest.raises(AudioFileError) as raised:
        open_it(path)
    assert words in str(raised.value) and str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", TONE, RATE)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read everything
    with pytest.raises(AudioFileError, match="no permission to read"):
        read(tmp_path / "a.wav")


def test_without_ffmpeg_the_error_says_what_to_install(tmp_path, no_ffmpeg):
    (tmp_path / "a.m4a").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(AudioFileError, match=r"allears\[media\]"):
        read(tmp_path / "a.m4a")


def test_media_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"allears\[media\]"):
        media.MediaSource(tmp_path / "a.m4a")


def info(subtype, container="WAV"):
    return AudioInfo(RATE, 1, 10, subtype, container)


@pytest.mark.parametrize(
    ("subtype", "suffix", "wanted"),
    [
        ("PCM_16", ".wav", "PCM_16"),
        ("PCM_24", ".wav", "PCM_24"),
        ("FLOAT", ".wav", "FLOAT"),
        ("DOUBLE", ".wav", "DOUBLE"),
        ("ULAW", ".wav", "ULAW"),
        ("PCM_U8", ".wav", "PCM_U8"),
        ("PCM_S8", ".wav", "PCM_U8"),
        ("PCM_U8", ".flac", "PCM_S8"),
        ("PCM_24", ".FLAC", "PCM_24"),
        ("FLOAT", ".flac", "PCM_24"),
        ("PCM_32", ".flac", "PCM_24"),
        ("ULAW", ".flac", "PCM_16"),
        ("ALAC_24", ".flac", "PCM_24"),
        ("IMA_ADPCM", ".wav", "PCM_16"),
        ("VORBIS", ".wav", "PCM_16"),
        ("aac", ".wav", "PCM_16"),
        ("VORBIS", ".ogg", "VORBIS"),
        ("OPUS", ".ogg", "OPUS"),
        ("PCM_16", ".ogg", "VORBIS"),
        ("VORBIS", ".opus", "OPUS"),
        ("FLOAT", ".mp3", "MPEG_LAYER_III"),
    ],
)
def test_the_sample_format_is_kept_where_the_container_has_it(tmp_path, subtype, suffix, wanted):
    assert matching_subtype(info(subtype), suffix) == wanted
    write(tmp_path / f"a{suffix}", TONE, RATE, wanted)  # and it can be written
    assert probe(tmp_path / f"a{suffix}").subtype == wanted


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_a_copy_has_the_same_samples(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, (500, 2)), RATE, subtype)
    samples, rate = read(tmp_path / "a.wav")
    write(tmp_path / "b.wav", samples, rate, matching_subtype(probe(tmp_path / "a.wav"), ".wav"))
    np.testing.assert_array_equal(read(tmp_path / "b.wav")[0], samples)


needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")


def encode(path, codec, samples, rate, sample_format):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        stream.format, stream.bit_rate = sample_format, 256_000
        for start in range(0, samples.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@needs_av
@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "subtype"),
    [("a.m4a", "aac", "fltp", "aac"), ("a.mka", "pcm_s16le", "s16", "PCM_16"), ("a.m4a", "alac", "s16p", "PCM_16")],
)
def test_media_files_are_read_through_ffmpeg(tmp_path, name, codec, sample_format, subtype):
    encode(tmp_path / name, codec, TONE, 44100, sample_format)
    samples, rate = read(tmp_path / name)
    about = probe(tmp_path / name)
    assert rate == 44100 and (about.channels, about.subtype) == (2, subtype)
    assert abs(samples.shape[1] - 20001) <= (1024 if codec == "aac" else 0)
    assert abs(about.frames - 20001) <= 1100
    error = (samples[:, :20001] - TONE[:, : samples.shape[1]])[:, 2000:18000]
    assert 10 * np.log10((error**2).mean() / (TONE**2).mean()) < (-25 if codec == "aac" else -80)
    with AudioReader(tmp_path / name, 3000) as reader:
        blocks = list(reader)
    assert {part.shape[1] for part in blocks[:-1]} == {3000}
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), samples)


@needs_av
def test_media_without_audio_or_sense(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(AudioFileError, match="holds no audio stream"):
        read(tmp_path / "a.mp4")
    (tmp_path / "b.wav").write_text("This is no sound. " * 200)
    with pytest.raises(AudioFileError, match=r"b\.wav: "):
        read(tmp_path / "b.wav")
