import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from allears.core.errors import MissingDependencyError, WeightsError
from allears.core.progress import Progress
from allears.core.weights import save_weights
from allears.models.video import PRESETS, VideoGenerator
from allears.models.video.files import animated_png, check_target, enlarge, write_video
from allears.models.video.model import VideoNet


def clip(frames=5, size=16, seed=0):
    rows = np.linspace(0, 200, size)
    base = rows[:, None, None] + np.array([0, 20, 50]) + 0 * rows[None, :, None]
    moving = np.stack([np.roll(base, step, axis=1) for step in range(frames)])
    return (moving + np.random.default_rng(seed).integers(0, 5, moving.shape)).astype(np.uint8)


def read_png(data):
    """A textbook reader of what is written: size, loop count, delays, and frames."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, frames, delays, size, kinds, numbers = 8, [], [], (0, 0), [], []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body, crc = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(kind + body)
        at += 12 + length
        kinds.append(kind)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
            assert body[8:] == bytes([8, 2, 0, 0, 0])
        elif kind == b"fcTL":
            numbers.append(struct.unpack(">I", body[:4])[0])
            delays.append(struct.unpack(">HH", body[20:24]))
        elif kind in (b"IDAT", b"fdAT"):
            if kind == b"fdAT":
                numbers.append(struct.unpack(">I", body[:4])[0])
                body = body[4:]
            rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(size[1], 1 + 3 * size[0])
            assert (rows[:, 0] == 2).all()
            frames.append(np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(size[1], size[0], 3))
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and numbers == list(range(len(numbers)))
    return np.stack(frames), delays


def test_an_animated_png_holds_every_pixel():
    frames = clip()
    found, delays = read_png(animated_png(frames, 8))
    assert np.array_equal(found, frames) and delays == [(1, 8)] * 5


def test_an_mp4_plays_what_was_written(tmp_path):
    av = pytest.importorskip("av")
    frames = clip(12, 32)
    write_video(tmp_path / "a.mp4", frames, 8, 64)
    write_video(tmp_path / "b.mp4", frames, 8, 64)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 8
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert found.shape == (12, 64, 64, 3)
    error = found.astype(float) - enlarge(frames, 64)
    assert np.abs(error).mean() < 6 and not list(tmp_path.glob(".*"))


def test_frames_are_enlarged_smoothly():
    flat = np.full((2, 16, 16, 3), 77, np.uint8)
    assert np.array_equal(enlarge(flat, 48), np.full((2, 48, 48, 3), 77, np.uint8))
    frames = clip(1)
    assert enlarge(frames, 16) is frames
    assert abs(enlarge(frames, 64).astype(float).mean() - frames.mean()) < 1


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("a.avi", 64, r"ends in \.mp4, or in \.png"),
        ("a", 64, "wanted a name"),
        ("none/a.png", 64, "does not exist"),
        ("a.png", 63, "size: 63"),
        ("a.png", 8, "size: 8"),
        ("a.png", 4096, "size: 4096"),
    ],
)
def test_targets_that_cannot_be_written(tmp_path, name, size, said):
    with pytest.raises(ValueError, match=said):
        check_target(tmp_path / name, size)


def test_frames_that_cannot_be_written(tmp_path):
    for frames in (clip().astype(float), clip()[0], clip()[:0], clip()[:, :8]):
        with pytest.raises(ValueError, match="frames: "):
            write_video(tmp_path / "a.png", frames, 8)
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_png_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"\.png.*allears\[media\]"):
        check_target(tmp_path / "a.mp4", 64)
    write_video(tmp_path / "a.png", clip(), 8)
    assert (tmp_path / "a.png").stat().st_size > 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of an untrained network that answers to its caption."""
    torch.manual_seed(0)
    net = VideoNet(PRESETS["test"])
    with torch.no_grad():
        net.leave.weight.normal_(std=0.2)
    from allears.core.config import to_dict

    out = tmp_path_factory.mktemp("video")
    save_weights(out / "weights", net.state_dict(), {"model": "video", "config": to_dict(net.config)})
    return out


def test_the_same_seed_gives_the_same_video_alone_or_in_a_batch(folder, tmp_path):
    generator = VideoGenerator.from_pretrained(folder, device="cpu")
    text, told = "a red ball rolls left behind a blue box", []
    video = generator(text, seed=3, steps=2, on_progress=told.append)
    assert video.frames.shape == (8, 16, 16, 3) and video.frames.dtype == np.uint8 and video.duration_s == 1
    assert told[-1] == Progress(2, 2, "steps", text) and video.spec.relation == "behind"
    again = generator("A red circle moves left behind a blue square!".replace("!", "."), seed=3, steps=2)
    assert np.array_equal(video.frames, again.frames) and again.caption == text  # the same scene in other words
    both = generator.batch(["a green star", text], seeds=[1, 3], steps=2)
    assert np.abs(both[1].frames.astype(int) - video.frames).max() <= 1
    assert not np.array_equal(video.frames, generator(text, seed=4, steps=2).frames)
    assert not np.array_equal(video.frames, generator("a green star", seed=3, steps=2).frames)
    assert not np.array_equal(video.frames, generator(text, seed=3, steps=2, guidance=1.0).frames)
    video.save(tmp_path / "a.png", 32)
    found, _ = read_png((tmp_path / "a.png").read_bytes())
    assert np.array_equal(found, enlarge(video.frames, 32))


def test_calls_that_make_no_sense(folder):
    generator = VideoGenerator.from_pretrained(folder, device="cpu")
    for call, said in (
        (lambda: generator("a red dog"), "'dog'"),
        (lambda: generator("a red ball", seed=-1), "seed: -1"),
        (lambda: generator("a red ball", steps=0), "steps: 0"),
        (lambda: generator("a red ball", solver="rk4"), "rk4"),
        (lambda: generator.batch([]), "a text"),
        (lambda: generator.batch(["a red ball"], seeds=[1, 2]), "seeds: 2"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(WeightsError):
        VideoGenerator.from_pretrained(folder / "none")
