"""``allears separate`` around a stand-in network whose answer is known: files, folders, refusals, failures, reports."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.models.split_nets import RATE_HZ, SplitNet, mix, speech

from allears.cli.main import main
from allears.models.separate import Separator


class Interrupted(SplitNet):
    """Somebody presses Ctrl-C in the third window."""

    def fingerprints(self, mixture):
        if len(self.windows) == 2:
            raise KeyboardInterrupt
        return super().fingerprints(mixture)


@pytest.fixture
def net(monkeypatch):
    return install(monkeypatch, SplitNet(3))


def install(monkeypatch, net):
    loaded = Separator(net, "cpu", "splitter")
    monkeypatch.setattr(Separator, "from_pretrained", lambda *_, **__: loaded)
    return net


def talk(path: Path, count: int = 2, seconds: float = 3.0, channels: int = 1) -> np.ndarray:
    """A recording of so many, the first from its begin on, each next a second later; their sources (J, S)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = speech(3, seconds, seed=count)
    for index in range(3):
        sources[index, : index * RATE_HZ] = 0
    sources[count:] = 0
    soundfile.write(path, np.repeat(mix(sources)[:, None], channels, axis=1), RATE_HZ, subtype="FLOAT")
    return sources


def run(*arguments) -> int:
    return main(["separate", *map(str, arguments)])


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_one_file_a_talker(tmp_path, net, capsys):
    sources = talk(tmp_path / "in.wav", channels=8)
    assert run(tmp_path / "in.wav", "-o", tmp_path / "new" / "out") == 0
    assert below(tmp_path / "new") == ["out/in-talker-1.wav", "out/in-talker-2.wav"]
    for number in (1, 2):
        got, rate = soundfile.read(tmp_path / "new" / "out" / f"in-talker-{number}.wav", dtype="float32")
        assert rate == RATE_HZ
        np.testing.assert_allclose(got, sources[number - 1], atol=1e-6)
    said = capsys.readouterr().out
    assert "out/in-talker-1.wav to in-talker-2.wav (2 talkers): 3.0 s of audio in" in said


@pytest.mark.parametrize(
    ("options", "count", "said"),
    [
        (["--talkers", "1"], 1, "(1 talker)"),
        (["--talkers", "3"], 3, "(3 talkers)"),
        (["--all-outputs"], 3, "(2 talkers)"),
        (["--talkers", "auto", "--one-pass-s", "10"], 2, "(2 talkers)"),
    ],
)
def test_options_reach_the_separator(tmp_path, net, capsys, options, count, said):
    talk(tmp_path / "in.wav", seconds=12)
    assert run(tmp_path / "in.wav", "-o", tmp_path / "out", *options) == 0
    assert below(tmp_path / "out") == [f"in-talker-{number}.wav" for number in range(1, count + 1)]
    assert said in capsys.readouterr().out
    assert len(net.windows) == (2 if "--one-pass-s" in options else 1)


def test_silence_gives_a_silent_file_and_says_so(tmp_path, net, capsys):
    soundfile.write(tmp_path / "in.wav", np.zeros(9000), 44_100)
    assert run(tmp_path / "in.wav", "-o", tmp_path / "out") == 0
    assert below(tmp_path / "out") == ["in-talker-1.wav"] and "(nobody speaks)" in capsys.readouterr().out


def test_folders_and_patterns_are_mirrored(tmp_path, net):
    for name in ("a.wav", "deep/er/b.flac", "deep/c.wav"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(800), 16_000)
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    wanted = ["a-talker-1.wav", "deep/c-talker-1.wav", "deep/er/b-talker-1.wav"]
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert below(tmp_path / "out") == wanted
    assert run(tmp_path / "in" / "**" / "*", "-o", tmp_path / "again") == 0
    assert below(tmp_path / "again") == wanted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([".", "-o", ".", "--overwrite"], "'x-talker-2.wav' is an input; outputs never overwrite inputs"),
        (["x.wav", "x-talker-2.wav", "-o", "."], "'x-talker-2.wav' is an input; outputs never overwrite inputs"),
        (["x.wav", "sub/x.wav", "-o", "out"], "would both be written to 'out/x-talker-1.wav'"),
        (["x.wav", "-o", "out.wav"], "out: 'out.wav' is named like one file, but several are written; name a folder"),
        (["x.wav", "-o", "notes.txt"], "out: 'notes.txt' exists and is no folder; name a folder\n"),
        (["x.wav", "-o", "taken"], "exists already; pass --overwrite to replace it, or --resume to keep it"),
        (["x.wav", "-o", "taken", "--overwrite", "--resume"], "choose one"),
        (["nowhere.wav", "-o", "out"], "no such file or folder"),
        (["no*.wav", "-o", "out"], "no sound file matches"),
        (["empty", "-o", "out"], "no sound file in this folder"),
        (["x.wav", "-o", "out", "--talkers", "0"], "talkers: got 0, wanted auto, or 1 or more"),
        (["x.wav", "-o", "out", "--talkers", "two"], "--talkers"),
        (["x.wav", "-o", "out", "--one-pass-s", "5"], "one-pass-s: got 5, wanted 10 or more"),
        (["x.wav", "-o", "foreign", "--report"], "is no report of allears"),
        (["-o", "out"], "inputs"),
        (["x.wav"], "-o"),
    ],
)
def test_refusals_come_before_any_work(tmp_path, net, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    for name in ("x.wav", "x-talker-2.wav", "sub/x.wav", "taken/x-talker-1.wav"):
        talk(tmp_path / name)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.html").write_text("<html>mine</html>")
    before = {name: (tmp_path / name).read_bytes() for name in below(tmp_path)}
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert net.windows == []
    assert {name: (tmp_path / name).read_bytes() for name in below(tmp_path)} == before


def test_more_talkers_than_the_model_has_are_refused(tmp_path, net, capsys):
    talk(tmp_path / "x.wav")
    assert run(tmp_path / "x.wav", "-o", tmp_path / "out", "--talkers", "4") == 2
    assert "talkers: got 4, but splitter tells 1 to 3 apart" in capsys.readouterr().err
    assert below(tmp_path / "out") == []


def test_a_bad_file_among_many_is_told_at_the_end(tmp_path, net, capsys):
    talk(tmp_path / "in" / "1.wav")
    (tmp_path / "in" / "2.wav").write_text("this is text, not sound")
    broken = np.full(5000, 0.1, np.float32)
    broken[77] = np.nan
    soundfile.write(tmp_path / "in" / "3.wav", broken, RATE_HZ, subtype="FLOAT")
    (tmp_path / "in" / "4.wav").write_bytes(b"")
    talk(tmp_path / "in" / "5.wav")
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--report") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [name for line in lines for name in ("2.wav", "3.wav", "4.wav") if name in line] == [
        "2.wav",
        "3.wav",
        "4.wav",
    ]
    assert lines[-1] == "allears: error: 3 of 5 files failed; the others are finished"
    wanted = [f"{name}-talker-{number}.wav" for name in (1, 5) for number in (1, 2)]
    assert below(tmp_path / "out") == [*wanted, "report.html"]


def test_a_single_bad_file_is_one_line(tmp_path, net, capsys):
    (tmp_path / "x.wav").write_bytes(b"")
    assert run(tmp_path / "x.wav", "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "x.wav" in error and "empty" in error


def test_a_folder_without_permission_is_told(tmp_path, net, capsys, monkeypatch):
    import os

    talk(tmp_path / "x.wav")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root, no folder is without permission
    assert run(tmp_path / "x.wav", "-o", tmp_path / "out") == 2
    assert "no permission" in capsys.readouterr().err and net.windows == []


def test_interrupt_keeps_whole_files_only_and_resume_does_the_rest(tmp_path, capsys, monkeypatch):
    for name in ("a.wav", "b.wav"):
        talk(tmp_path / "in" / name)
    long = talk(tmp_path / "in" / "c.wav", seconds=60)
    interrupted = install(monkeypatch, Interrupted(3))
    assert run(tmp_path / "in", "-o", tmp_path / "out") == 130
    wanted = [f"{name}-talker-{number}.wav" for name in "ab" for number in (1, 2)]
    assert below(tmp_path / "out") == wanted and len(interrupted.windows) == 2
    assert "2 files are finished; the same command with --resume does the rest" in capsys.readouterr().err
    kept = [(tmp_path / "out" / name).stat().st_mtime_ns for name in wanted]
    net = install(monkeypatch, SplitNet(3))
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--resume", "--report") == 0
    assert [(tmp_path / "out" / name).stat().st_mtime_ns for name in wanted] == kept
    assert len(net.windows) == 3  # of c alone
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article>") == 3 and page.count("by an earlier run") == 2
    got = soundfile.read(tmp_path / "out" / "c-talker-2.wav", dtype="float32")[0]
    np.testing.assert_allclose(got, long[1], atol=1e-6)


def test_overwriting_takes_away_talkers_of_the_earlier_run(tmp_path, net):
    talk(tmp_path / "x.wav", count=3)
    assert run(tmp_path / "x.wav", "-o", tmp_path / "out") == 0
    talk(tmp_path / "x.wav", count=1)
    assert run(tmp_path / "x.wav", "-o", tmp_path / "out", "--overwrite") == 0
    assert below(tmp_path / "out") == ["x-talker-1.wav"]


class Strips(HTMLParser):
    """The rows of "who speaks when": label to marks (begin, width), in thousandths of the length."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[float, float]]] = {}
        self.row: list[tuple[float, float]] | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "svg":
            self.row = self.rows.setdefault(found["aria-label"], []) if "aria-label" in found else None
        elif tag == "rect" and self.row is not None:
            self.row.append((float(found["x"]), float(found["width"])))


def test_the_report_shows_who_speaks_when(tmp_path, net, capsys):
    sources = talk(tmp_path / "in" / "a<b.wav", seconds=40.0)
    sources[1, 10 * RATE_HZ : 30 * RATE_HZ] = 0
    soundfile.write(tmp_path / "in" / "a<b.wav", mix(sources), RATE_HZ, subtype="FLOAT")
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--report") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    rows = Strips(page).rows
    assert list(rows) == ["when talker 1 speaks", "when talker 2 speaks"]
    np.testing.assert_allclose(rows["when talker 1 speaks"], [(0, 1000)], atol=1)
    np.testing.assert_allclose(rows["when talker 2 speaks"], [(25, 225), (750, 250)], atol=1)
    level = 10 * np.log10(np.mean(np.square(sources[0])))
    assert f"<dt>talker 1</dt><dd>{level:.1f} dB, speaks 40.0 s</dd>" in page
    assert "<dt>talkers</dt><dd>2</dd>" in page and "a&lt;b.wav" in page and "real-time factor" in page
    assert "splitter (0.00 M parameters)" in page and "the first 30 s of 40.0 s" in page
    assert page.count("<audio") == 3 and page.count('alt="spectrogram of ') == 3
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--report", "--overwrite") == 0  # its own page may be replaced


def test_the_verb_starts_without_torch_until_it_needs_the_model(tmp_path):
    code = (
        "import sys; from allears.cli.main import main;"
        f"status = main(['separate', {str(tmp_path)!r}, '-o', {str(tmp_path / 'out')!r}]);"
        "sys.exit(1 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no sound file" in done.stderr
