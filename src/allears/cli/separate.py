"""``allears separate``: recordings of people who talk at once in, one file per talker out."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from allears.core.progress import OnProgress

if TYPE_CHECKING:
    from allears.audio.activity import Activity
    from allears.audio.report import ReportEntry
    from allears.cli.batch import Done
    from allears.cli.targets import Target

logger = logging.getLogger(__name__)

MOST_TALKERS = 9
"""So many names are kept from being overwritten before the model has told how many outputs it has."""

Inputs = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    tyro.conf.arg(metavar="IN...", help_behavior_hint=""),
]


@dataclass
class Separate:
    """Part the talkers of a recording: each gets a file of their own, NAME-talker-1.wav and so on.

    Talkers are numbered in the order in which they first speak, and stay on their file over any length. Every file has
    its input's sample rate and length, and is mono: the mean of the channels is heard. Files of any length run in
    bounded memory. The files of an input appear when all of them are complete, inputs are never overwritten, and a bad
    file among many is reported at the end (exit status 2) while the others are finished.

    There is no live stream: the network hears a whole stretch of the recording before it gives the first sample.

    For instance "allears separate meeting.wav -o talkers", or "allears separate recordings/ -o talkers --report".
    """

    inputs: Inputs
    """Audio files, folders (searched through) or quoted patterns such as 'in/**/*.wav'."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """A folder; it mirrors an input folder."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """A shipped model, or a folder with a checkpoint; by default the shipped separator."""

    talkers: Annotated[Literal["auto"] | int, tyro.conf.arg(metavar="auto|INT")] = "auto"
    """How many talkers to write files for, where you know; else it is estimated."""

    all_outputs: bool = False
    """Write everything that the model gives, also what counts as no talker."""

    one_pass_s: Annotated[float | None, tyro.conf.arg(metavar="SECONDS")] = None
    """Longer recordings are heard in windows of this length: memory grows with it. By default 30; on a GPU 120."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    overwrite: bool = False
    """Replace outputs that exist."""

    resume: bool = False
    """Keep the outputs of inputs that are finished, and do the rest."""

    report: bool = False
    """Write report.html next to the outputs: players, spectrograms, who speaks when, levels, time taken."""

    def run(self) -> int:
        from allears.cli.batch import finish, prepare_outputs, run_batch
        from allears.cli.compare import check_page, total, write_page
        from allears.cli.targets import plan

        if self.talkers != "auto" and self.talkers < 1:
            raise ValueError(f"talkers: got {self.talkers}, wanted auto, or 1 or more")
        if self.one_pass_s is not None and not self.one_pass_s >= 10:
            raise ValueError(f"one-pass-s: got {self.one_pass_s:g}, wanted 10 or more")
        targets = plan(self.inputs, self.out, _talker_files)
        page = self.out / "report.html"
        if self.report:
            check_page(page)
        prepare_outputs(self.out, [target.destination for target in targets], self.overwrite, self.resume)

        from allears.models.separate import Separator  # brings torch: after everything that can fail without it

        model = () if self.model is None else (self.model,)
        separator = Separator.from_pretrained(*model, device=self.device)
        talkers = None if self.talkers == "auto" else self.talkers
        if talkers is not None and talkers > separator.config.talkers:
            raise ValueError(
                f"talkers: got {talkers}, but {separator.name} tells 1 to {separator.config.talkers} apart"
            )
        logger.info("%d files, model %s on %s", len(targets), separator.name, separator.device)

        def process(source: Path, destination: Path, on_progress: OnProgress):
            return separator.process_file(
                source,
                destination.parent,
                talkers=talkers,
                all_outputs=self.all_outputs,
                one_pass_s=self.one_pass_s,
                on_progress=on_progress,
            )

        done, failures = run_batch(targets, process, self.resume, _tell)
        if self.report and done:
            settings = {
                "model": f"{separator.name} ({separator.parameters / 1e6:.2f} M parameters)",
                "device": str(separator.device),
                "talkers": str(self.talkers),
            }
            write_page(page, "Talkers, separated", done, _entry, {**settings, **total(done)})
            print(f"report: {page}")
        return finish(done, failures, len(targets))


COMMAND = Separate


def _talker_files(place: Path) -> list[Path]:
    """All that may come out of the input with this place below OUT; the first is put there last."""
    from allears.audio.naming import talker_file

    return [place.with_name(talker_file(place.stem, number)) for number in range(1, MOST_TALKERS + 1)]


def _tell(target: "Target", result: Any) -> str:
    count = {0: "nobody speaks", 1: "1 talker"}.get(result.count, f"{result.count} talkers")
    more = f" to {result.files[-1].name}" if len(result.files) > 1 else ""
    return f"{result.files[0]}{more} ({count})"


def _entry(item: "Done") -> "ReportEntry":
    """What the report shows of a recording: itself, every talker, and who speaks when."""
    from allears.audio.files import probe
    from allears.audio.report import ReportEntry, Track
    from allears.audio.report_axes import Strip
    from allears.cli.compare import EARLIER, start

    target, result = item.target, item.result
    files = [path for path in (target.destination, *target.others) if path.exists()]
    length_s = probe(files[0]).duration_s
    names = [f"talker {number}" for number in range(1, len(files) + 1)]
    active = _activities(files)
    facts = {"talkers": str(getattr(result, "count", len(files)))}
    for name, activity in zip(names, active, strict=True):
        spoken = f"{activity.level_db:.1f} dB, speaks {activity.active_s:.1f} s" if activity.spans else "silent"
        facts[name] = spoken
    heard = zip(["mixture", *names], [target.source, *files], strict=True)
    return ReportEntry(
        title=str(target.source),
        tracks=[Track(name, *start(path), full_duration_s=length_s) for name, path in heard],
        elapsed_s=result.elapsed_s if result else None,
        duration_s=length_s,
        facts=facts if result else {**facts, **EARLIER},
        strips=[Strip(name, activity.spans) for name, activity in zip(names, active, strict=True)],
    )


def _activities(files: Sequence[Path]) -> "list[Activity]":
    """When each of the files, which have one rate and length, is active; read in blocks, side by side."""
    import numpy as np

    from allears.audio.activity import PowerMeter
    from allears.audio.files import AudioReader

    with ExitStack() as stack:
        readers = [stack.enter_context(AudioReader(path)) for path in files]
        meter = PowerMeter(len(files), readers[0].info.sample_rate_hz)
        for blocks in zip(*readers, strict=True):
            meter.push(np.concatenate(blocks))
    return meter.activities()
