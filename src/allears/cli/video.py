"""``allears video``: a sentence in, a short video out."""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from allears.core.progress import OnProgress, Progress

logger = logging.getLogger(__name__)


@dataclass
class Video:
    """Make a short video of a small world from a sentence: one or two coloured things, what they do, and the camera.

    For instance "allears video 'a red ball rolls left behind a blue box' -o out.mp4", or "... 'a big yellow star spins
    at night while the camera zooms in' -o star.png".

    Things: ball, box, triangle, star; red, orange, yellow, green, blue, purple, white; small or big. They roll left or
    right, fall, rise, bounce, spin or stay; two of them are joined by 'behind', 'in front of', 'beside' or 'and'.
    Places: 'in a room', 'at night', 'on a beach', 'by day'. The camera pans left or right, or zooms in or out.
    An unknown word is an error that says which are known.
    """

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """What is to be seen."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    """A file: .mp4 (needs the extra [media]), or .png for an animated PNG, which needs no package."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """A shipped model, or a folder with a checkpoint; by default the shipped one."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Sampler steps: more is slower. By default what the model was trained for; distilled weights take 1 to 4."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """How strongly the text is followed; other than 1 it takes twice the time. By default the model's own."""

    seed: int = 0
    """Seed of all that the text does not say; the same seed gives the same file."""

    size: int = 256
    """Width and height of the file in pixels, an even number; the model's own pixels are scaled to it."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    check: bool = False
    """Judge the video by program, and say what of the text it shows."""

    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        if self.out.exists() and not self.overwrite:
            raise ValueError(f"out: {str(self.out)!r} exists already; pass --overwrite to replace it")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise ValueError(f"steps: got {self.steps}, wanted 1 to 1000")

        from allears.models.video.files import check_target

        check_target(self.out, self.size)

        from allears.data.world_text import parse
        from allears.models.video import VideoGenerator

        parse(self.text, self.seed)  # a text that names no scene fails before weights are read
        name = () if self.model is None else (self.model,)
        generator = VideoGenerator.from_pretrained(*name, device=self.device)
        logger.info("model %s on %s", generator.name, generator.device)
        with _bar() as on_progress:
            video = generator(
                self.text, seed=self.seed, steps=self.steps, guidance=self.guidance, on_progress=on_progress
            )
        video.save(self.out, self.size)
        print(f"{self.out}: {video.caption}; {video.duration_s:.1f} s of video in {video.elapsed_s:.1f} s")
        if self.check:
            print(_verdict(video))
        return 0


COMMAND = Video


def _verdict(video: Any) -> str:
    import torch

    from allears.data.world_check import check_videos

    frames = torch.from_numpy(video.frames).permute(3, 0, 1, 2)[None].float() / 255
    seen = check_videos(frames, [video.spec])[0].seen
    missing = ", ".join(name for name, there in seen.items() if not there)
    return f"shows {sum(seen.values())} of {len(seen)} things asked for" + (f"; not: {missing}" if missing else "")


@contextmanager
def _bar() -> Generator[OnProgress, None, None]:
    """A bar of the sampler's steps on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("")

        def follow(event: Progress) -> None:
            bar.update(task, total=event.total, completed=event.done, description=f"step {event.done:.0f}")

        yield follow
