"""``allears enhance`` around a stand-in model that halves the signal: files, folders, refusals, failures, reports."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from allears.audio.files import AudioReader, AudioWriter, matching_subtype
from allears.cli.main import main
from allears.cli.targets import plan
from allears.core.errors import AudioFileError, MissingDependencyError
from allears.core.progress import Progress


@dataclass(frozen=True)
class Halved:
    duration_s: float
    elapsed_s: float


class HalvingEnhancer:
    """Writes half of every sample; is interrupted in a file ``stop``, and finds the disk full in ``full``."""

    name, parameters, device, config = "halver", 0, "cpu", SimpleNamespace(steps=2)

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None, int]] = []

    def process_file(self, src, dst, *, steps=None, seed=0, on_progress=None):
        self.calls.append((Path(src).name, steps, seed))
        with AudioReader(src, block_frames=4000) as reader:
            info = reader.info
            subtype = matching_subtype(info, Path(dst).suffix)
            with AudioWriter(dst, info.sample_rate_hz, info.channels, subtype) as writer:
                for block in reader:
                    writer.write(block * np.float32(0.5))
                    on_progress(Progress(writer.frames / info.sample_rate_hz, info.duration_s))
                    if Path(src).stem == "stop":
                        raise KeyboardInterrupt
                    if Path(src).stem == "full":
                        raise AudioFileError(f"{dst}: cannot be written: {os.strerror(errno.ENOSPC)}")
        return Halved(writer.frames / info.sample_rate_hz, 0.25)


@pytest.fixture
def enhancer(monkeypatch):
    import allears.models.enhance as room

    stand_in = HalvingEnhancer()
    monkeypatch.setattr(room.Enhancer, "from_pretrained", lambda *_, **__: stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def no_dnsmos(monkeypatch):
    """DNSMOS takes seconds a clip; here its package is missing, which the other scores must survive."""
    import allears.audio.metrics as metrics

    real = metrics.score_clip

    def score_clip(reference, estimate, sample_rate_hz, metrics):
        if metrics[0].startswith("dnsmos"):
            raise MissingDependencyError("the metric dnsmos needs the package 'speechmos'")
        return real(reference, estimate, sample_rate_hz, metrics=metrics)

    monkeypatch.setattr(metrics, "score_clip", score_clip)


def tone(path: Path, seconds: float = 0.5, rate: int = 16000, channels: int = 1, level: float = 0.5) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    samples = np.stack([wave * (c + 1) / channels for c in range(channels)], axis=1)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return samples


def run(*arguments) -> int:
    return main(["enhance", *map(str, arguments)])


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_one_file_to_one_file_keeps_rate_and_channels(tmp_path, enhancer, capsys):
    samples = tone(tmp_path / "in.wav", rate=44100, channels=2)
    out = tmp_path / "new" / "out.flac"
    assert run(tmp_path / "in.wav", "-o", out, "--steps", "3", "--seed", "7") == 0
    got, rate = soundfile.read(out)
    assert rate == 44100 and got.shape == samples.shape
    np.testing.assert_allclose(got, samples / 2, atol=1e-4)
    assert enhancer.calls == [("in.wav", 3, 7)]
    assert "0.5 s of audio in 0.2 s (real-time factor 0.500)" in capsys.readouterr().out
    assert below(tmp_path) == ["in.wav", "new/out.flac"]


def test_a_folder_is_mirrored(tmp_path, enhancer):
    for name in ("a.wav", "deep/er/b.flac", "deep/c.ogg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.full(800, 0.1), 16000)
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert below(tmp_path / "out") == ["a.wav", "deep/c.ogg", "deep/er/b.flac"]


def test_patterns_are_expanded_and_keep_their_tree(tmp_path, enhancer):
    for name in ("x/1.wav", "y/1.wav", "y/2.txt"):
        tone(tmp_path / "in" / name) if name.endswith("wav") else (tmp_path / "in" / name).write_text("")
    assert run(tmp_path / "in" / "**" / "*.wav", "-o", tmp_path / "out") == 0
    assert below(tmp_path / "out") == ["x/1.wav", "y/1.wav"]


def test_results_inside_the_input_folder_are_not_taken_as_inputs(tmp_path, enhancer):
    tone(tmp_path / "a.wav")
    assert run(tmp_path, "-o", tmp_path / "clean") == 0
    assert run(tmp_path, "-o", tmp_path / "clean", "--overwrite") == 0
    assert below(tmp_path) == ["a.wav", "clean/a.wav"]


def test_several_folders_keep_their_names(tmp_path):
    tone(tmp_path / "one" / "a.wav")
    tone(tmp_path / "two" / "a.wav")
    targets = plan([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert [t.destination for t in targets] == [tmp_path / "out/one/a.wav", tmp_path / "out/two/a.wav"]


def test_what_cannot_be_written_becomes_wav_and_repeats_are_taken_once(tmp_path):
    tone(tmp_path / "a.wav")
    (tmp_path / "a.wav").rename(tmp_path / "voice.m4a")
    targets = plan([tmp_path / "voice.m4a", tmp_path / "." / "voice.m4a"], tmp_path / "out")
    assert [t.destination for t in targets] == [tmp_path / "out" / "voice.wav"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a.wav", "-o", "a.wav", "--overwrite"], "is an input; outputs never overwrite inputs"),
        (["a.wav", "-o", "link.wav", "--overwrite"], "is an input; outputs never overwrite inputs"),
        ([".", "-o", ".", "--overwrite"], "is an input; outputs never overwrite inputs"),
        (["a.wav", "sub/a.wav", "-o", "out"], "would both be written to"),
        (["a.wav", "sub/a.wav", "-o", "out.wav"], "is one file, but the input is more than one"),
        (["a.wav", "-o", "taken.wav"], "exists already; pass --overwrite to replace it, or --resume to keep it"),
        (["a.wav", "-o", "taken.wav", "--overwrite", "--resume"], "choose one"),
        (["a.wav", "-o", "notes.txt"], "exists and is no folder"),
        (["nowhere.wav", "-o", "out"], "no such file or folder"),
        (["no*.wav", "-o", "out"], "no sound file matches"),
        (["empty", "-o", "out"], "no sound file in this folder"),
        (["a.wav", "-o", "out.wav", "--steps", "0"], "steps: got 0, wanted 1 to 30"),
        (["a.wav", "-o", "out.wav", "--reference", "a.wav"], "pass --report too"),
        (["a.wav", "-o", "out.wav", "--reference", "stereo.wav", "--report"], "channels is 2, but the input's is 1"),
        (["a.wav", "-o", "foreign/out.wav", "--report"], "is no report of allears"),
        (["-o", "out"], "inputs"),
        (["a.wav"], "-o"),
    ],
)
def test_refusals_come_before_any_work(tmp_path, enhancer, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    tone(tmp_path / "a.wav")
    tone(tmp_path / "sub" / "a.wav")
    tone(tmp_path / "taken.wav")
    tone(tmp_path / "stereo.wav", channels=2)
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.html").write_text("<html>mine</html>")
    before = {name: (tmp_path / name).read_bytes() for name in below(tmp_path)}
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert enhancer.calls == []
    assert {name: (tmp_path / name).read_bytes() for name in below(tmp_path)} == before


def test_a_bad_file_among_many_is_told_at_the_end(tmp_path, enhancer, capsys):
    for name in ("1.wav", "3.wav"):
        tone(tmp_path / "in" / name)
    (tmp_path / "in" / "2.wav").write_text("this is text, not sound")
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--report") == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("allears: error: ") and "2.wav" in lines[0]
    assert lines[1] == "allears: error: 1 of 3 files failed; the others are finished"
    assert below(tmp_path / "out") == ["1.wav", "3.wav", "report.html"]


def test_a_single_bad_file_is_one_line(tmp_path, enhancer, capsys):
    (tmp_path / "x.wav").write_bytes(b"")
    assert run(tmp_path / "x.wav", "-o", tmp_path / "out.wav") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "x.wav" in error and "empty" in error


def test_interrupt_keeps_finished_files_and_leaves_nothing_half_written(tmp_path, enhancer, capsys):
    for name in ("a.wav", "stop.wav", "z.wav"):
        tone(tmp_path / "in" / name)
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 130
    assert below(tmp_path / "out") == ["a.wav"]
    assert "1 files are finished; the same command with --resume does the rest" in capsys.readouterr().err


def test_a_full_disk_ends_the_run(tmp_path, enhancer, capsys):
    for name in ("a.wav", "full.wav", "z.wav"):
        tone(tmp_path / "in" / name)
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "full.wav" in lines[0] and "No space left on device" in lines[0]
    assert lines[1:] == ["allears: error: 1 of 3 files failed, 1 were not tried; the others are finished"]
    assert below(tmp_path / "out") == ["a.wav"]


def test_resume_does_only_what_is_missing(tmp_path, enhancer, capsys):
    for name in ("a.wav", "b.wav"):
        tone(tmp_path / "in" / name)
    assert run(tmp_path / "in" / "a.wav", "-o", tmp_path / "out") == 0
    kept = (tmp_path / "out" / "a.wav").stat().st_mtime_ns
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--resume", "--report") == 0
    assert [name for name, *_ in enhancer.calls] == ["a.wav", "b.wav"]
    assert (tmp_path / "out" / "a.wav").stat().st_mtime_ns == kept
    page = (tmp_path / "out" / "report.html").read_text()
    assert "by an earlier run" in page and page.count("<article>") == 2


def test_report_has_scores_against_the_reference(tmp_path, enhancer, capsys):
    clean = tone(tmp_path / "clean.wav", seconds=1.0)
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "noisy.wav", clean + 0.05 * rng.standard_normal(clean.shape), 16000, subtype="FLOAT")
    out = tmp_path / "o" / "out.wav"
    assert run(tmp_path / "noisy.wav", "-o", out, "--report", "--reference", tmp_path / "clean.wav") == 0
    page = (tmp_path / "o" / "report.html").read_text()
    wanted = 10 * np.log10(np.mean(clean**2) / 0.05**2)  # halving does not change SI-SDR
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("SI-SDR, dB"))
    before, after, change = map(float, line.split()[-3:])
    assert before == pytest.approx(wanted, abs=0.3) and after == pytest.approx(before, abs=0.02)
    assert abs(change) <= 0.02
    assert f"<td>SI-SDR, dB</td><td>{before:.2f}</td>" in page and "DNSMOS" not in page
    assert "halver (0.00 M parameters)" in page and "real-time factor" in page
    assert run(tmp_path / "noisy.wav", "-o", out, "--report", "--overwrite") == 0  # its own page may be replaced


def test_the_verb_starts_without_torch_until_it_needs_the_model(tmp_path):
    code = (
        "import sys; from allears.cli.main import main;"
        f"status = main(['enhance', {str(tmp_path)!r}, '-o', {str(tmp_path / 'out')!r}]);"
        "sys.exit(1 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no sound file" in done.stderr
