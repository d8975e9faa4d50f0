"""``allears cancel-echo`` around a stand-in network whose answer is known: pairs, refusals, failures, reports."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tests.models.echo_nets import SMALL

from allears.cli.main import main
from allears.models.echo import EchoCanceller
from allears.models.echo.model import EchoNet, Heard

RATE_HZ = 16_000


class HalfNet(EchoNet):
    """Gives the microphone less half the reference; finds a delay of 4 ms, and always voice."""

    def __init__(self):
        super().__init__(SMALL)
        self.heard = 0

    def cancel(self, spectra, state):
        mics, _, _, frames, _ = spectra.shape
        self.heard += frames * SMALL.hop
        alignment = torch.zeros(mics, frames, SMALL.align_frames)
        alignment[:, :, 2] = 1.0
        return spectra[:, 0] - 0.5 * spectra[:, 1], Heard(alignment, torch.full((mics, frames), 3.0)), state


class Interrupted(HalfNet):
    """Somebody presses Ctrl-C after so many samples."""

    def cancel(self, spectra, state):
        if self.heard > 9000:
            raise KeyboardInterrupt
        return super().cancel(spectra, state)


@pytest.fixture
def net(monkeypatch):
    return install(monkeypatch, HalfNet())


def install(monkeypatch, net):
    loaded = EchoCanceller(net, "cpu", "half")
    monkeypatch.setattr(EchoCanceller, "from_pretrained", lambda *_, **__: loaded)
    loaded.net.heard = 0
    return loaded.net


def sound(path: Path, seconds: float = 0.25, seed: int = 0, channels: int = 1, rate: int = RATE_HZ) -> np.ndarray:
    """Noise (C, T) in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal((channels, int(seconds * rate))).astype(np.float32)
    soundfile.write(path, samples.T, rate, subtype="FLOAT")
    return samples


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


def run(*arguments) -> int:
    return main(["cancel-echo", *map(str, arguments)])


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_two_files_to_one(tmp_path, net, capsys):
    mic, played = sound(tmp_path / "mic.wav", channels=2), sound(tmp_path / "ref.wav", seed=1, channels=3)
    out = tmp_path / "new" / "near.wav"
    assert run(tmp_path / "mic.wav", tmp_path / "ref.wav", "-o", out) == 0
    np.testing.assert_allclose(read(out), mic - 0.5 * played.mean(0), atol=1e-6)
    said = capsys.readouterr()
    assert f"mic.wav -> {out}: 0.2 s of audio in" in said.out and "real-time factor" in said.out and said.err == ""
    assert below(tmp_path / "new") == ["near.wav"]


@pytest.mark.parametrize(
    ("options", "channels", "at"),
    [(["--stereo"], 2, 1), (["--reference-channel", "1"], 2, 0), (["--reference-channel", "2"], 3, 1)],
)
def test_one_file_with_both(tmp_path, net, options, channels, at):
    both = sound(tmp_path / "call.wav", channels=channels)
    assert run(tmp_path / "call.wav", "-o", tmp_path / "near.wav", *options) == 0
    wanted = np.delete(both, at, axis=0) - 0.5 * both[at]
    np.testing.assert_allclose(read(tmp_path / "near.wav"), wanted, atol=1e-6)


def test_folders_and_patterns_are_paired(tmp_path, net, capsys):
    names = ("a", "deep/b", "deep/er/a")
    mics = {name: sound(tmp_path / "mic" / f"{name}.wav", seed=i) for i, name in enumerate(names)}
    refs = {name: sound(tmp_path / "ref" / f"{name}.flac.wav", seed=9 + i) for i, name in enumerate(names)}
    for name in names:
        (tmp_path / "ref" / f"{name}.flac.wav").rename(tmp_path / "ref" / f"{name}.aiff")
    sound(tmp_path / "ref" / "of-nobody.wav")
    assert run(tmp_path / "mic", tmp_path / "ref", "-o", tmp_path / "out") == 0
    assert below(tmp_path / "out") == [f"{name}.wav" for name in names]
    for name in names:
        (tmp_path / "mic" / f"{name}.wav").rename(tmp_path / "mic" / f"{name}_mic.wav")
        (tmp_path / "ref" / f"{name}.aiff").rename(tmp_path / "mic" / f"{name}_ref.wav")
    patterns = tmp_path / "mic" / "**" / "*_mic.wav", tmp_path / "mic" / "**" / "*_ref.wav"
    assert run(*patterns, "-o", tmp_path / "again") == 0
    assert below(tmp_path / "again") == [f"{name}_mic.wav" for name in names]
    for name in names:
        wanted = mics[name] - 0.5 * refs[name]
        np.testing.assert_allclose(read(tmp_path / "out" / f"{name}.wav"), wanted, atol=1e-6)
        np.testing.assert_allclose(read(tmp_path / "again" / f"{name}_mic.wav"), wanted, atol=1e-6)
    capsys.readouterr()


def test_one_reference_goes_with_all_and_folders_may_hold_stereo(tmp_path, net):
    mics = [sound(tmp_path / "mic" / f"{k}.wav", seed=k) for k in range(2)]
    played = sound(tmp_path / "ref.wav", seed=5)
    assert run(tmp_path / "mic", tmp_path / "ref.wav", "-o", tmp_path / "out") == 0
    for k in range(2):
        np.testing.assert_allclose(read(tmp_path / "out" / f"{k}.wav"), mics[k] - 0.5 * played, atol=1e-6)
    call = sound(tmp_path / "calls" / "x.wav", channels=2)
    assert run(tmp_path / "calls", "--stereo", "-o", tmp_path / "out") == 0
    np.testing.assert_allclose(read(tmp_path / "out" / "x.wav"), call[:1] - 0.5 * call[1:], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["m.wav", "-o", "o.wav"],
            "reference: none given; name what the loudspeaker played after MIC, or pass --stereo",
        ),
        (["m.wav", "r.wav", "-o", "o.wav", "--stereo"], "choose one of REF, --stereo and --reference-channel"),
        (["m.wav", "r.wav", "-o", "o.wav", "--reference-channel", "1"], "choose one of REF"),
        (["m.wav", "-o", "o.wav", "--stereo", "--reference-channel", "1"], "stereo and reference-channel: choose one"),
        (["m.wav", "-o", "o.wav", "--reference-channel", "0"], "reference-channel: got 0, wanted 1 or more"),
        (["m.wav", "m.wav", "-o", "o.wav"], "reference: 'm.wav' is the microphone's file too"),
        (["m.wav", "link.wav", "-o", "o.wav"], "reference: 'link.wav' is the microphone's file too"),
        (["m.wav", "r.wav", "-o", "m.wav", "--overwrite"], "out: 'm.wav' is an input; outputs never overwrite inputs"),
        (["m.wav", "r.wav", "-o", "r.wav", "--overwrite"], "out: 'r.wav' is an input; outputs never overwrite inputs"),
        (["m.wav", "none.wav", "-o", "o.wav"], "none.wav: there is no such file or folder"),
        (["none.wav", "r.wav", "-o", "o.wav"], "none.wav: there is no such file or folder"),
        (["m.wav", "refs", "-o", "o.wav"], "reference: 'refs' is a folder, but the microphone 'm.wav' is one file"),
        (["m.wav", "refs/*.wav", "-o", "o.wav"], "'refs/*.wav' is a pattern, but the microphone 'm.wav' is one file"),
        (["mics", "empty", "-o", "out"], "empty: no sound file in this folder"),
        (["mics", "none", "-o", "out"], "none: there is no such file or folder"),
        (["mics", "refs", "-o", "out"], "nothing in 'refs' goes with the microphone 'mics/2.wav' (and 1 more)"),
        (["mics/*.wav", "refs/*.flac", "-o", "out"], "no sound file matches this pattern"),
        (["mics", "twice", "-o", "out"], "'twice/1.aiff' and 'twice/1.wav' would belong to the same microphone"),
        (["mics", "r.wav", "-o", "o.wav"], "out: 'o.wav' is one file, but the input is more than one"),
        (
            ["m.wav", "r.wav", "-o", "taken.wav"],
            "exists already; pass --overwrite to replace it, or --resume to keep it",
        ),
        (["m.wav", "r.wav", "-o", "taken.wav", "--overwrite", "--resume"], "choose one"),
        (["m.wav", "r.wav", "-o", "foreign/o.wav", "--report"], "is no report of allears"),
        (["m.wav", "r.wav", "-o", "o.wav", "--runtime", "tensorrt"], "--runtime"),
        (["m.wav", "r.wav", "x.wav", "-o", "o.wav"], "x.wav"),
        (["m.wav", "r.wav"], "-o"),
        (["-o", "o.wav"], "MIC"),
    ],
)
def test_refusals_come_before_any_work(tmp_path, net, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    names = ("m", "r", "taken", "mics/1", "mics/2", "mics/3", "refs/1", "twice/1", "twice/2", "twice/3")
    for seed, name in enumerate(names):
        sound(Path(f"{name}.wav"), seed=seed)
    Path("twice/1.aiff").write_bytes(Path("twice/1.wav").read_bytes())
    Path("link.wav").symlink_to("m.wav")
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign/report.html").write_text("<html>mine</html>")
    before = {name: Path(name).read_bytes() for name in below(Path())}
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1, error
    assert net.heard == 0
    assert {name: Path(name).read_bytes() for name in below(Path())} == before


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
        (lambda path: path.write_text("this is text, not sound"), "x.wav: "),
        (lambda path: soundfile.write(path, np.zeros((0, 1)), RATE_HZ), "holds no samples"),
        (lambda path: soundfile.write(path, np.float32([0, np.nan]), RATE_HZ, "FLOAT"), "sample 1 is NaN or infinite"),
    ],
    ids=["empty", "text", "header", "nan"],
)
def test_a_single_bad_file_is_one_line(tmp_path, net, capsys, make, text):
    make(tmp_path / "x.wav")
    sound(tmp_path / "good.wav")
    for pair in (["x.wav", "good.wav"], ["good.wav", "x.wav"]):
        assert run(*(tmp_path / name for name in pair), "-o", tmp_path / "o.wav") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("allears: error: ") and "x.wav" in error and text in error
    assert below(tmp_path) == ["good.wav", "x.wav"]


@pytest.mark.parametrize(
    ("mic", "played", "warning"),
    [
        ({"seconds": 1 / RATE_HZ}, {"seconds": 1 / RATE_HZ}, ""),
        ({"channels": 8}, {"channels": 8}, ""),
        ({"rate": 8_000}, {"rate": 96_000}, ""),
        ({"rate": 96_000}, {"rate": 44_100}, ""),
        ({"rate": 44_100}, {"rate": 8_000, "seconds": 130.0}, "the reference goes on for 129.75 s"),
        ({"seconds": 2.0}, {}, "the reference ends after 0.25 s, 1.75 s before the microphone"),
        ({"seconds": 3.0}, {"seconds": 2.98}, "their clocks drift apart by 6667 ppm"),
    ],
    ids=["one-sample", "eight", "8-96", "96-44", "minutes", "short", "drift"],
)
def test_odd_files_go_through_and_what_is_odd_is_told(tmp_path, net, capsys, mic, played, warning):
    given = sound(tmp_path / "m.wav", **mic)
    sound(tmp_path / "r.wav", seed=1, **played)
    assert run(tmp_path / "m.wav", tmp_path / "r.wav", "-o", tmp_path / "o.wav") == 0
    got, info = read(tmp_path / "o.wav"), soundfile.info(tmp_path / "o.wav")
    assert got.shape == given.shape and info.samplerate == mic.get("rate", RATE_HZ) and info.subtype == "FLOAT"
    error = capsys.readouterr().err
    assert error.count("\n") == bool(warning) and warning in error


def test_silence_stays_silence_and_is_told(tmp_path, net, capsys):
    soundfile.write(tmp_path / "m.wav", np.zeros(4000), RATE_HZ)
    soundfile.write(tmp_path / "r.wav", np.zeros(4000), RATE_HZ)
    assert run(tmp_path / "m.wav", tmp_path / "r.wav", "-o", tmp_path / "o.wav", "--report") == 0
    assert not read(tmp_path / "o.wav").any()
    error = capsys.readouterr().err
    assert "the microphone is silent throughout" in error and "the reference is silent throughout" in error


def test_a_bad_file_among_many_is_told_at_the_end(tmp_path, net, capsys):
    for name in "123":
        sound(tmp_path / "mic" / f"{name}.wav")
        sound(tmp_path / "ref" / f"{name}.wav", seed=1)
    (tmp_path / "ref" / "2.wav").write_text("this is text, not sound")
    assert run(tmp_path / "mic", tmp_path / "ref", "-o", tmp_path / "out", "--report") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "ref/2.wav" in lines[0]
    assert lines[1] == "allears: error: 1 of 3 files failed; the others are finished"
    assert below(tmp_path / "out") == ["1.wav", "3.wav", "report.html"]


def test_interrupt_keeps_whole_files_only_and_resume_does_the_rest(tmp_path, capsys, monkeypatch):
    sound(tmp_path / "mic" / "a.wav")
    sound(tmp_path / "mic" / "b.wav", seconds=2.0)
    sound(tmp_path / "ref.wav", seconds=2.0)
    command = tmp_path / "mic", tmp_path / "ref.wav", "-o", tmp_path / "out"
    install(monkeypatch, Interrupted())
    assert run(*command) == 130
    assert below(tmp_path / "out") == ["a.wav"] and not list(tmp_path.rglob("*.part"))
    assert "1 files are finished; the same command with --resume does the rest" in capsys.readouterr().err
    kept = (tmp_path / "out" / "a.wav").stat().st_mtime_ns
    install(monkeypatch, HalfNet())
    assert run(*command, "--resume", "--report") == 0
    assert below(tmp_path / "out") == ["a.wav", "b.wav", "report.html"]
    assert (tmp_path / "out" / "a.wav").stat().st_mtime_ns == kept
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article>") == 2 and page.count("by an earlier run") == 1


def test_the_report_shows_what_was_found(tmp_path, net, capsys):
    sound(tmp_path / "a<b.wav", seconds=2.0)
    played = sound(tmp_path / "ref.wav", seconds=2.0, seed=1)
    played[:, RATE_HZ:] = 0
    soundfile.write(tmp_path / "ref.wav", played.T, RATE_HZ, subtype="FLOAT")
    arguments = tmp_path / "a<b.wav", tmp_path / "ref.wav", "-o", tmp_path / "out", "--report"
    assert run(*arguments) == 0
    assert f"report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a&lt;b.wav" in page and "half (0.0" in page and "cpu, pytorch" in page and "ref.wav</dd>" in page
    assert page.count("<audio") == 3 and page.count('alt="spectrogram of ') == 3
    assert "<dt>delay found</dt><dd>4 ms (mostly 4 to 4), sure for 100% of the echo</dd>" in page
    assert "<dt>reference plays</dt><dd>1.0 s</dd>" in page and "<dt>near end speaks</dt><dd>2.0 s</dd>" in page
    assert run(*arguments, "--overwrite") == 0  # its own page may be replaced


def test_options_reach_the_canceller(tmp_path, monkeypatch):
    seen = {}

    def load(*names, **options):
        seen.update(options, names=names)
        return EchoCanceller(HalfNet(), "cpu")

    monkeypatch.setattr(EchoCanceller, "from_pretrained", load)
    sound(tmp_path / "m.wav")
    sound(tmp_path / "r.wav")
    options = ["--weights", "runs/mine", "--device", "cpu", "--runtime", "onnx"]
    assert run(tmp_path / "m.wav", tmp_path / "r.wav", "-o", tmp_path / "o.wav", *options) == 0
    assert seen == {"names": ("runs/mine",), "device": "cpu", "runtime": "onnx"}


def test_the_verb_starts_without_torch_until_it_needs_the_model(tmp_path):
    code = (
        "import sys; from allears.cli.main import main;"
        f"status = main(['cancel-echo', {str(tmp_path)!r}, '--stereo', '-o', {str(tmp_path / 'out')!r}]);"
        "sys.exit(1 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no sound file" in done.stderr
