"""``allears cancel-echo``: what a microphone heard and a loudspeaker played in, the talker at the microphone out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from allears.core.progress import OnProgress

if TYPE_CHECKING:
    from allears.audio.report import ReportEntry
    from allears.cli.batch import Done

logger = logging.getLogger(__name__)

Mic = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MIC", help_behavior_hint="")]
Reference = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[REF]", help_behavior_hint="")]


@dataclass
class CancelEcho:
    """Take the echo of a loudspeaker out of a microphone's recording; the voice at the microphone stays.

    MIC is what the microphone heard, REF what the loudspeaker played, from the same moment on; their rates, depths,
    lengths and channel counts may differ. No delay is to be told: 0 to 1 s is found, and followed when it changes. One
    file may hold both (--stereo, --reference-channel).

    The output keeps the rate and length of MIC, and its channels: each is a microphone of its own, REF is heard as the
    mean of its channels, and a reference channel of MIC is not written. Where REF ends early it counts as silent, and
    what it has more than MIC is not used; a warning says so, and what lengths that differ by less than 1 % say about
    the clocks.

    Folders pair files of the same place and name, quoted patterns those with the same text for the wildcards. Files of
    any length run in bounded memory, an output appears when it is complete, inputs are never overwritten, and a bad
    file among many is reported at the end (exit status 2).

    For instance "allears cancel-echo mic.wav ref.wav -o near.wav", "allears cancel-echo call.wav --stereo -o near.wav",
    or "allears cancel-echo 'rec/*_mic.wav' 'rec/*_ref.wav' -o near --report".
    """

    mic: Mic
    """A sound file, a folder (searched through), or a quoted pattern."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    """A file, for one input file; else a folder that mirrors MIC's."""

    reference: Reference = None
    """The same for the reference; or one file, which goes with every MIC."""

    stereo: bool = False
    """MIC is stereo: microphone left, reference right."""

    reference_channel: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """The channel of MIC that is the reference, from 1; the others are microphones."""

    weights: Annotated[str | None, tyro.conf.arg(aliases=["--model"], metavar="NAME|FOLDER")] = None
    """Shipped weights, or a folder with a checkpoint; by default the shipped canceller."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    runtime: Literal["pytorch", "onnx"] = "pytorch"
    """What runs the network; onnx is onnxruntime on one CPU thread, from pip install 'allears[onnx]'."""

    overwrite: bool = False
    """Replace outputs that exist."""

    resume: bool = False
    """Keep outputs that exist, and do the rest."""

    report: bool = False
    """Write report.html next to the outputs: players, spectrograms, delay and attenuation over time, activity."""

    def run(self) -> int:
        from allears.cli.batch import finish, prepare_outputs, run_batch
        from allears.cli.compare import check_page, total, write_page
        from allears.cli.echo_pairs import pair
        from allears.cli.targets import plan

        self._check()
        targets = plan([self.mic], self.out)
        references = {} if self.reference is None else pair(self.mic, self.reference, targets)
        folder = self.out.parent if targets[0].destination == self.out else self.out
        page = folder / "report.html"
        if self.report:
            check_page(page)
        prepare_outputs(folder, [target.destination for target in targets], self.overwrite, self.resume)

        from allears.models.echo import EchoCanceller  # brings torch: after everything that can fail without it
        from allears.models.echo.report import entry, hear

        weights = () if self.weights is None else (self.weights,)
        canceller = EchoCanceller.from_pretrained(*weights, device=self.device, runtime=self.runtime)
        logger.info("%d files, model %s on %s", len(targets), canceller.name, canceller.device)

        def process(source: Path, destination: Path, on_progress: OnProgress):
            return canceller.process_file(
                source,
                references.get(source),
                destination,
                reference_channel=self.reference_channel,
                on_progress=on_progress,
            )

        def show(item: "Done") -> "ReportEntry":
            from allears.cli.compare import EARLIER

            source, destination = item.target.source, item.target.destination
            heard = hear(source, references.get(source), destination, self.reference_channel)
            played = {} if source not in references else {"reference": str(references[source])}
            return entry(str(source), heard, item.result, played if item.result else {**played, **EARLIER})  # type: ignore[arg-type]

        done, failures = run_batch(targets, process, self.resume)
        if self.report and done:
            settings = {
                "model": f"{canceller.name} ({canceller.parameters / 1e6:.2f} M parameters)",
                "device": f"{canceller.device}, {canceller.runtime}",
            }
            write_page(page, "Echo, cancelled", done, show, {**settings, **total(done)})
            print(f"report: {page}")
        return finish(done, failures, len(targets))

    def _check(self) -> None:
        inside = self.stereo or self.reference_channel is not None
        if self.reference is None and not inside:
            raise ValueError(
                "reference: none given; name what the loudspeaker played after MIC, or pass --stereo (microphone left, "
                "reference right) or --reference-channel for one file with both"
            )
        if self.reference is not None and inside:
            raise ValueError(
                f"reference: {str(self.reference)!r} is given, and a channel of MIC as well; choose one of REF, "
                "--stereo and --reference-channel"
            )
        if self.stereo and self.reference_channel is not None:
            raise ValueError("stereo and reference-channel: choose one; the first is for files of two channels")
        if self.reference_channel is not None and self.reference_channel < 1:
            raise ValueError(f"reference-channel: got {self.reference_channel}, wanted 1 or more")


COMMAND = CancelEcho
