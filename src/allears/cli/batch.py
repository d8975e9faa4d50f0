"""Runs a verb over many files: one progress bar; a bad file does not stop the rest; an interrupt leaves whole files."""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from allears.audio.files import probe
from allears.cli.main import describe
from allears.cli.targets import Target
from allears.core.progress import OnProgress, Progress


class Result(Protocol):
    """What a pipeline says about one finished file: seconds of audio, and seconds of work."""

    @property
    def duration_s(self) -> float: ...
    @property
    def elapsed_s(self) -> float: ...


Process = Callable[[Path, Path, OnProgress], Result]
"""``process(source, destination, on_progress)``: writes the destination in whole or not at all."""


@dataclass(frozen=True)
class Done:
    """A finished file; ``result`` is ``None`` where an earlier run had finished it."""

    target: Target
    result: Result | None


@dataclass(frozen=True)
class Failure:
    """A file that could not be processed, and why."""

    source: Path
    error: Exception


def prepare_outputs(folder: Path, destinations: Sequence[Path], overwrite: bool, resume: bool) -> None:
    """Make the output folder, and check before any work that it can be written to and that nothing there is lost.

    Raises:
        ValueError: an output exists and neither flag is set, or both are.
        OSError: the folder cannot be made or written to.
    """
    if overwrite and resume:
        raise ValueError("overwrite and resume: choose one; the first redoes finished files, the second keeps them")
    existing = [path for path in destinations if path.exists()]
    if existing and not (overwrite or resume):
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ValueError(
            f"out: {str(existing[0])!r} exists already{more}; pass --overwrite to replace it, or --resume to keep it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write into the folder", str(folder))


def _destination(target: Target, result: Any) -> str:
    return str(target.destination)


def run_batch(
    targets: Sequence[Target],
    process: Process,
    resume: bool = False,
    tell: Callable[[Target, Any], str] = _destination,
) -> tuple[list[Done], list[Failure]]:
    """Process every target in order, and say so on stdout, a line a file; the bar is drawn on stderr of a terminal.

    ``tell`` gives from a target and its result what was written.

    A file that raises ValueError, OSError or ImportError counts as failed and the rest goes on, except where the
    disk is full, which ends the run. Whatever else is raised, an interrupt too, passes through; finished files stay.
    """
    done: list[Done] = []
    failures: list[Failure] = []
    seconds = [_duration_s(target.source) for target in targets]
    with _bar() as bar, _tell_interrupt(done):
        task = bar.add_task("", total=sum(seconds) or None, state="")
        before = 0.0
        for target, length in zip(targets, seconds, strict=True):
            name = target.source.name
            bar.update(task, description=name)
            if resume and target.destination.exists():
                done.append(Done(target, None))
                _say(f"{target.source}: kept {target.destination}, finished by an earlier run")
            else:
                try:
                    target.destination.parent.mkdir(parents=True, exist_ok=True)
                    result = process(target.source, target.destination, _follow(bar, task, before))
                except (ValueError, OSError, ImportError) as error:
                    failures.append(Failure(target.source, error))
                    if _disk_is_full(error):
                        break
                else:
                    done.append(Done(target, result))
                    rtf = result.elapsed_s / max(result.duration_s, 1e-9)
                    _say(
                        f"{target.source} -> {tell(target, result)}: {result.duration_s:.1f} s of audio in "
                        f"{result.elapsed_s:.1f} s (real-time factor {rtf:.3f})"
                    )
            before += length
            bar.update(task, completed=before)
    return done, failures


def finish(done: Sequence[Done], failures: Sequence[Failure], total: int) -> int:
    """Tell what failed of ``total`` files, a line a file on stderr, and return the exit status: 0, or 2 if any failed.

    Raises:
        Exception: the failure itself, where it was the only file.
    """
    if not failures:
        return 0
    if total == 1:
        raise failures[0].error
    for failure in failures:
        text = describe(failure.error)
        place = "" if str(failure.source) in text else f"{failure.source}: "
        print(f"allears: error: {place}{text}", file=sys.stderr)
    untried = total - len(done) - len(failures)
    rest = f", {untried} were not tried" if untried else ""
    rest += "; the others are finished" if done else ""
    print(f"allears: error: {len(failures)} of {total} files failed{rest}", file=sys.stderr)
    return 2


def _duration_s(path: Path) -> float:
    """Seconds of audio for the bar; 0 where the file cannot say, which is told when its turn comes."""
    try:
        return float(probe(path).duration_s or 0.0)
    except (ValueError, OSError, ImportError):
        return 0.0


def _disk_is_full(error: BaseException) -> bool:
    """Whether a full disk or quota is behind the error; libsndfile's errors carry no number, so the text counts too."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


@contextmanager
def _tell_interrupt(done: Sequence[Done]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"{len(done)} files are finished; the same command with --resume does the rest", file=sys.stderr)
        raise


def _follow(bar: Any, task: Any, before: float) -> OnProgress:
    def on_progress(event: Progress) -> None:
        bar.update(task, completed=before + event.done)
        speed, total = bar.tasks[0].speed, bar.tasks[0].total
        state = f"{before + event.done:.0f} s" + (f" of {total:.0f} s" if total else "")
        bar.update(task, state=state + (f", {speed:.1f} x real time" if speed else ""))

    return on_progress


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        TextColumn("{task.fields[state]}", markup=False),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _say(text: str) -> None:
    print(text, flush=True)
