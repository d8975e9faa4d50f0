"""The video model for users: a sentence in, a short video out.

Shapes: T frames, H rows, W columns.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from allears.core.device import resolve_device
from allears.core.progress import OnProgress, Progress
from allears.core.weights import load_pretrained
from allears.data.world import WorldSpec
from allears.data.world_text import caption, encode, parse
from allears.models.video.build import load_net
from allears.models.video.config import VideoConfig
from allears.models.video.files import write_video
from allears.models.video.model import VideoNet
from allears.models.video.sample import calls_of, draw_noise, generate, generate_few
from allears.ops.attention.sparse_linear.options import Precision
from allears.ops.gemm.schemes import SchemeName

DEFAULT = "video-base"


@dataclass(frozen=True)
class Video:
    """What :class:`VideoGenerator` made.

    Args:
        frames: uint8 (T, H, W, 3).
        fps: frames a second.
        caption: the text in the words that the model was given.
        spec: what the text asks for, as a value, by which ``allears.data.world_check`` judges the video.
        seed: of its noise.
        elapsed_s: time taken, shared out among the videos of a call.
    """

    frames: np.ndarray
    fps: int
    caption: str
    spec: WorldSpec
    seed: int
    elapsed_s: float

    @property
    def duration_s(self) -> float:
        return len(self.frames) / self.fps

    def save(self, path: str | os.PathLike[str], size_px: int | None = None) -> None:
        """Write it as .mp4 or animated .png; see :func:`allears.models.video.files.write_video`."""
        write_video(path, self.frames, self.fps, size_px)


class VideoGenerator:
    """Makes videos of a small world of coloured things.

    >>> generator = VideoGenerator.from_pretrained()
    >>> generator("a red ball rolls left behind a blue box").save("out.mp4", size_px=256)

    Args:
        net: a trained network; see :meth:`from_pretrained`.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        name: shown in reports.
    """

    def __init__(self, net: VideoNet, device: str | torch.device = "auto", name: str = "custom") -> None:
        self.device = resolve_device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.config: VideoConfig = net.config
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = DEFAULT,
        device: str | torch.device = "auto",
        precision: Precision | None = None,
        linear: SchemeName | None = None,
    ) -> "VideoGenerator":
        """Load shipped weights by name, or your own from a folder (with ``weights.safetensors`` and ``weights.json``)
        or a path stem: dense or sparse, distilled or not.

        Args:
            precision: of attention, ``exact`` or ``int8_fp8`` (8-bit kernels, for GPUs); by default exact on a CPU, and
                elsewhere what the weights were tuned for.
            linear: 8-bit linear layers (W8A8) of this scheme, such as ``fp8_row``; ``None`` leaves them.

        Raises:
            WeightsError: nothing is found there, or it is corrupt or of another model.
        """
        found = load_pretrained(name_or_folder, "video", VideoConfig)
        where = resolve_device(device)
        net = load_net(found, precision or ("exact" if where.type == "cpu" else None), linear)
        return cls(net, where, found.name)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def __call__(
        self,
        text: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str = "euler",
        on_progress: OnProgress | None = None,
    ) -> Video:
        """One video.

        Args:
            text: what is to be seen, in the words of ``allears.data.world_text``.
            seed: of the noise, 0 or more; the same seed gives the same frames on the same machine.
            steps: solver steps; more cost time in proportion. The default is the model's own. Distilled weights take 1
                to 4.
            guidance: how strongly the text is followed, 1 for as it comes (half the time). The default is the model's.
                Distilled weights have it built in, and take 1.
            solver: ``euler``, ``midpoint`` or ``heun``; not read by distilled weights.
            on_progress: told of each call of the network.

        Raises:
            ValueError: the text has an unknown word or names no scene of this world, or an option is out of its range.
        """
        return self.batch([text], seeds=[seed], steps=steps, guidance=guidance, solver=solver, on_progress=on_progress)[
            0
        ]

    def batch(
        self,
        texts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str = "euler",
        on_progress: OnProgress | None = None,
    ) -> list[Video]:
        """Several videos at once; ``seeds`` are 0, 1, 2 ... where not given. Options as in a call for one.

        Raises:
            ValueError: see a call for one; or there are not as many seeds as texts.
        """
        begun = time.perf_counter()
        seeds = list(range(len(texts))) if seeds is None else list(seeds)
        if len(seeds) != len(texts) or not texts:
            raise ValueError(f"seeds: {len(seeds)} given for {len(texts)} texts; wanted one a text, and a text")
        if min(seeds) < 0:
            raise ValueError(f"seed: {min(seeds)} given; a whole number from 0 up is wanted")
        specs = [parse(text, seed) for text, seed in zip(texts, seeds, strict=True)]
        said = [caption(spec) for spec in specs]
        numbers = [encode(words, self.config.words, self.config.text_words) for words in said]
        tokens = torch.tensor(numbers, device=self.device)
        few = self.config.distilled
        if few and guidance not in (None, 1):
            raise ValueError(f"guidance: {guidance} given; distilled weights have theirs built in, leave it out")
        total = calls_of(self.config.steps if steps is None else steps, "euler" if few else solver)

        def tell(done: int) -> None:
            if on_progress is not None:
                on_progress(Progress(done, total, "steps", said[0] if len(said) == 1 else f"{len(said)} videos"))

        on_gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            if few:
                videos = generate_few(self.net, self.config, tokens, seeds, steps, tell)
            else:
                noise = draw_noise(self.config, seeds).to(self.device)
                videos = generate(self.net, self.config, tokens, noise, steps, guidance, solver, tell)
        frames = (videos.permute(0, 2, 3, 4, 1) * 255).round().to(torch.uint8).cpu().numpy()
        took = (time.perf_counter() - begun) / len(texts)
        return [
            Video(clip, self.config.fps, words, spec, seed, took)
            for clip, words, spec, seed in zip(frames, said, specs, seeds, strict=True)
        ]
