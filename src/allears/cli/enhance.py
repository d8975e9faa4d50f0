"""``allears enhance``: noisy speech recordings in, clean ones out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from allears.core.progress import OnProgress

logger = logging.getLogger(__name__)

Inputs = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    tyro.conf.arg(metavar="IN...", help_behavior_hint=""),
]


@dataclass
class Enhance:
    """Clean recorded speech: noise and reverberation go, the voice stays.

    Every output keeps its input's sample rate, channels and length. Files of any length run in bounded memory. An
    output appears under its name only when it is complete, inputs are never overwritten, and a bad file among many is
    reported at the end (exit status 2) while the others are finished.

    For instance "allears enhance noisy.wav -o clean.wav", or "allears enhance recordings/ -o cleaned --report".
    """

    inputs: Inputs
    """Audio files, folders (searched through) or quoted patterns such as 'in/**/*.wav'."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    """A file, for one input file; else a folder that mirrors the input folder."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """A shipped model, or a folder with a checkpoint; by default the shipped enhancer."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Sampler steps: more is slower. By default what the model was tuned for."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    seed: int = 0
    """Seed of the sampler's noise; the same seed gives the same output."""

    overwrite: bool = False
    """Replace outputs that exist."""

    resume: bool = False
    """Keep outputs that exist, and do the rest."""

    report: bool = False
    """Write report.html next to the outputs: players, spectrograms, scores, time taken."""

    reference: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The clean recording of the one input, for scores against it in the report (needs --report)."""

    def run(self) -> int:
        from allears.cli.batch import finish, prepare_outputs, run_batch
        from allears.cli.compare import Comparison, to_text, total
        from allears.cli.targets import plan

        if self.steps is not None and not 1 <= self.steps <= 30:
            raise ValueError(f"steps: got {self.steps}, wanted 1 to 30")
        if self.reference is not None and not self.report:
            raise ValueError("reference: its scores go into the report; pass --report too")
        targets = plan(self.inputs, self.out)
        folder = self.out.parent if targets[0].destination == self.out else self.out
        comparison = Comparison(folder / "report.html", "Speech, enhanced", "input", "enhanced", self.reference)
        if self.report:
            comparison.check([target.source for target in targets])
        prepare_outputs(folder, [target.destination for target in targets], self.overwrite, self.resume)

        from allears.models.enhance import Enhancer  # brings torch: after everything that can fail without it

        model = () if self.model is None else (self.model,)
        enhancer = Enhancer.from_pretrained(*model, device=self.device)
        logger.info("%d files, model %s on %s", len(targets), enhancer.name, enhancer.device)

        def process(source: Path, destination: Path, on_progress: OnProgress):
            return enhancer.process_file(source, destination, steps=self.steps, seed=self.seed, on_progress=on_progress)

        done, failures = run_batch(targets, process, self.resume)
        if self.report and done:
            settings = {
                "model": f"{enhancer.name} ({enhancer.parameters / 1e6:.2f} M parameters)",
                "steps": str(self.steps or enhancer.config.steps),
                "device": str(enhancer.device),
                "seed": str(self.seed),
            }
            means = comparison.write(done, {**settings, **total(done)})
            if means:
                print(to_text(means))
            print(f"report: {comparison.page}")
        return finish(done, failures, len(targets))


COMMAND = Enhance
