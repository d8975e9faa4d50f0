"""The enhancer for users: waveforms and files of any rate, channel count and length in, the same out, without the
noise.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.audio.files import AudioReader
from allears.audio.formats import matching_subtype
from allears.audio.session import Session, as_batch, as_given
from allears.audio.writer import AudioWriter
from allears.core.device import resolve_device
from allears.core.progress import OnProgress, Progress
from allears.core.weights import check_keys, load_pretrained
from allears.models.enhance.chunks import ChunkedEnhancer
from allears.models.enhance.config import EnhanceConfig
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance, sampler
from allears.models.enhance.slices import SlicedNet

log = logging.getLogger(__name__)

DEFAULT = "enhance-base"
_BLOCK_FRAMES = 65_536


@dataclass(frozen=True)
class FileResult:
    """What :meth:`Enhancer.process_file` did."""

    duration_s: float
    elapsed_s: float
    sample_rate_hz: int
    channels: int
    frames: int

    @property
    def rtf(self) -> float:
        """Real-time factor: processing time over duration."""
        return self.elapsed_s / self.duration_s if self.duration_s else 0.0


class Enhancer:
    """Removes noise and late reverberation from speech.

    >>> enhancer = Enhancer.from_pretrained()
    >>> clean = enhancer(noisy, sample_rate_hz=48_000)

    Args:
        net: a trained network; see :meth:`from_pretrained`.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        name: shown in reports.
    """

    def __init__(self, net: EnhanceNet, device: str | torch.device = "auto", name: str = "custom") -> None:
        self.device = resolve_device(device)
        self.net = net.to(device=self.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore
        self.config: EnhanceConfig = net.config
        self.name = name

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = DEFAULT, device: str | torch.device = "auto") -> "Enhancer":
        """Load shipped weights by name, or your own from a folder (with ``weights.safetensors`` and
        ``weights.json``) or a path stem.

        Raises:
            WeightsError: nothing is found there, or it is corrupt or of another model.
        """
        found = load_pretrained(name_or_folder, "enhance", EnhanceConfig)
        net = EnhanceNet(found.config)
        check_keys(net, found.tensors)
        net.load_state_dict(found.tensors)
        return cls(net, device, found.name)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def __call__(
        self,
        audio: np.ndarray | Tensor,
        sample_rate_hz: int,
        *,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
    ) -> Any:
        """Enhance a waveform.

        Args:
            audio: (T,), (C, T) or (B, C, T), floating, nominally in [-1, 1]; an array or a tensor.
            sample_rate_hz: its rate, 4,000 to 384,000.
            steps: solver steps, 1 to 30; more cost time in proportion. The default is the model's own.
            solver: ``euler``, ``midpoint`` or ``heun``; the default is the model's own.
            seed: of the flow's noise; the same seed gives the same samples.

        Returns:
            The same kind, shape and rate.

        Raises:
            ValueError: not floating, not finite, empty, or of another shape; or an option is out of its range.
        """
        x = as_batch(audio)
        session = self._session(x.shape[0] * x.shape[1], sample_rate_hz, steps, solver, seed)
        flat = x.reshape(-1, x.shape[2])
        y = np.concatenate([session.push(flat), session.flush()], axis=1).reshape(audio.shape)
        return as_given(y, audio)

    def process_file(
        self,
        src: str | Path,
        dst: str | Path,
        *,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> FileResult:
        """Enhance a file in bounded memory, whatever its length. ``dst`` gets the rate, channels, length and, where
        its format allows, bit
        depth of ``src``; it appears under its name only when it is complete.

        Raises:
            AudioFileError: ``src`` cannot be read or ``dst`` cannot be written.
            ValueError: an option is out of its range.
        """
        begun = time.perf_counter()
        with AudioReader(src, block_frames=_BLOCK_FRAMES) as reader:
            info = reader.info
            session = self._session(info.channels, info.sample_rate_hz, steps, solver, seed)
            subtype = matching_subtype(info, Path(dst).suffix)
            total = info.duration_s
            done = 0
            with AudioWriter(dst, info.sample_rate_hz, info.channels, subtype, info.frames) as writer:
                for block in reader:
                    done += block.shape[1]
                    writer.write(session.push(block))
                    if on_progress is not None:
                        on_progress(Progress(done / info.sample_rate_hz, total, "s", Path(src).name))
                writer.write(session.flush())
        return FileResult(
            done / info.sample_rate_hz, time.perf_counter() - begun, info.sample_rate_hz, info.channels, done
        )

    def _session(self, channels: int, rate: int, steps: int | None, solver: str | None, seed: int) -> Session:
        if seed < 0:
            raise ValueError(f"seed: {seed} given; a whole number from 0 up is wanted")
        steps, solver = sampler(self.config, steps, solver)
        predict = SlicedNet(self.net) if self.device.type == "cpu" else self.net

        def run(windows: Tensor, noise: Tensor) -> Tensor:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
            ):
                return enhance(predict, self.config, windows.to(self.device), steps, solver, noise.to(self.device))

        batch = 16 if self.device.type == "cuda" else 1
        chunked = ChunkedEnhancer(self.config, channels, run, seed, batch)
        return Session(chunked, channels, channels, rate, self.config.sample_rate_hz)
