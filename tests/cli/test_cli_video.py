"""``allears video`` around a stand-in that paints what it is asked for."""

import subprocess
import sys

import numpy as np
import pytest

from allears.cli.main import VERBS, main
from allears.core.progress import Progress
from allears.data.world_render import render
from allears.data.world_text import caption, parse
from allears.models.video import Video, VideoGenerator


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setitem(VERBS, "video", "make a short video from a sentence")


class Painter:
    name, device = "painter", "cpu"

    def __init__(self):
        self.calls = []

    def __call__(self, text, *, seed, steps, guidance, on_progress):
        self.calls.append((text, seed, steps, guidance))
        on_progress(Progress(1, 1, "steps"))
        spec = parse(text, seed)
        frames = (render([spec])[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()
        return Video(frames, 8, caption(spec), spec, seed, 0.5)


@pytest.fixture
def painter(monkeypatch):
    stand_in = Painter()
    monkeypatch.setattr(VideoGenerator, "from_pretrained", lambda *_, **__: stand_in)
    return stand_in


def run(*arguments):
    return main(["video", *map(str, arguments)])


def test_a_sentence_becomes_a_file(painter, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert (
        run("a red ball rolls left behind a blue box", "-o", out, "--seed", 4, "--steps", 3, "--size", 64, "--check")
        == 0
    )
    assert painter.calls == [("a red ball rolls left behind a blue box", 4, 3, None)]
    said = capsys.readouterr().out
    assert "4.0 s of video in 0.5 s" in said and "shows 11 of 11 things asked for" in said
    assert out.read_bytes()[:4] == b"\x89PNG"
    first = out.read_bytes()
    assert run("a red ball rolls left behind a blue box", "-o", out, "--seed", 4, "--size", 64) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("a red ball rolls left behind a blue box", "-o", out, "--seed", 4, "--size", 64, "--overwrite") == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a red dog", "-o", "a.png"), "'dog' is unknown"),
        (("a red ball", "-o", "a.wav"), "animated PNG"),
        (("a red ball", "-o", "a.png", "--steps", 0), "wanted 1 to 1000"),
        (("a red ball", "-o", "a.png", "--size", 65), "size: 65"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(painter, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err and not painter.calls and not list(tmp_path.iterdir())


def test_what_is_not_shown_is_told(painter, tmp_path, capsys, monkeypatch):
    import allears.cli.video as verb

    real = verb._verdict
    monkeypatch.setattr(
        verb, "_verdict", lambda video: real(Video(np.full_like(video.frames, 90), 8, "", video.spec, 0, 0.0))
    )
    assert run("a red ball spins", "-o", tmp_path / "a.png", "--size", 64, "--check") == 0
    assert "not: colour 1, shape 1, size 1, motion 1" in capsys.readouterr().out


def test_help_is_quick():
    code = (
        "import sys; from allears.cli.main import VERBS, main; VERBS.setdefault('video', '');"
        "main(['video', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "rolls left behind" in done.stdout
