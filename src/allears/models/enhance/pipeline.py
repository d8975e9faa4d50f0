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
from allears.audio.resample import StreamResampler, fit_length
from allears.audio.writer import AudioWriter
from allears.core.config import from_dict
from allears.core.device import resolve_device
from allears.core.errors import WeightsError
from allears.core.progress import OnProgress, Progress
from allears.core.weights import check_keys, load_weights, weight_paths
from allears.models.enhance.chunks import ChunkedEnhancer
from allears.models.enhance.config import EnhanceConfig
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance, sampler
from allears.models.enhance.slices import SlicedNet

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parents[2] / "weights"
DEFAULT = "enhance-base"
_BLOCK_FRAMES = 65_536
_LOUDEST = 1e15  # full scale is 1; squares of larger samples leave float32


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


class _Session:
    """Caller's rate to the core's and back around the chunked enhancer; as many samples come out as went in."""

    def __init__(self, chunked: ChunkedEnhancer, channels: int, rate: int, core_rate: int) -> None:
        self._chunked = chunked
        self._down = StreamResampler(channels, rate, core_rate) if rate != core_rate else None
        self._up = StreamResampler(channels, core_rate, rate) if rate != core_rate else None
        self._in = 0
        self._out = 0

    def push(self, x: np.ndarray) -> np.ndarray:
        if (peak := float(np.abs(x).max(initial=0.0))) > _LOUDEST:
            raise ValueError(f"audio: a sample of size {peak:.1e}; full scale is 1, and {_LOUDEST:.0e} the most taken")
        self._in += x.shape[1]
        y = self._chunked.push(self._down.push(x) if self._down else x)
        return self._trim(self._up.push(y) if self._up else y)

    def flush(self) -> np.ndarray:
        rest = self._chunked.push(self._down.flush()) if self._down else None
        y = self._chunked.flush() if rest is None else np.concatenate([rest, self._chunked.flush()], axis=1)
        if self._up:
            y = np.concatenate([self._up.push(y), self._up.flush()], axis=1)
        return fit_length(y, self._in - self._out)

    def _trim(self, y: np.ndarray) -> np.ndarray:
        y = y[:, : self._in - self._out]
        self._out += y.shape[1]
        return y


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
        stem = _find_weights(name_or_folder)
        tensors, record = load_weights(stem)
        if record.get("model") != "enhance":
            raise WeightsError(
                f"weights {str(stem)!r}: made for model {record.get('model')!r}, wanted 'enhance'; choose another file"
            )
        try:
            config = from_dict(EnhanceConfig, record.get("config"), "config")
        except ValueError as error:
            raise WeightsError(f"weights {f'{stem}.json'!r}: {error}") from error
        net = EnhanceNet(config)
        check_keys(net, tensors)
        net.load_state_dict(tensors)
        return cls(net, device, stem.name)

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
        x = _as_batch(audio)
        session = self._session(x.shape[0] * x.shape[1], sample_rate_hz, steps, solver, seed)
        flat = x.reshape(-1, x.shape[2])
        y = np.concatenate([session.push(flat), session.flush()], axis=1).reshape(audio.shape)
        if isinstance(audio, Tensor):
            return torch.from_numpy(y).to(audio)
        return y.astype(audio.dtype, copy=False)

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

    def _session(self, channels: int, rate: int, steps: int | None, solver: str | None, seed: int) -> _Session:
        if not 4_000 <= rate <= 384_000:
            raise ValueError(f"sample_rate_hz: {rate} given; rates from 4000 to 384000 are taken")
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
        return _Session(
            ChunkedEnhancer(self.config, channels, run, seed, batch), channels, rate, self.config.sample_rate_hz
        )


def _find_weights(name_or_folder: str | Path) -> Path:
    given = Path(name_or_folder)
    stems = [given / "weights"]
    if given.name:  # "." and "/" have none
        stems += [weight_paths(given)[0].with_suffix(""), SHIPPED / given]
    for stem in stems:
        if any(path.is_file() for path in weight_paths(stem)):
            return stem
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("enhance*.json"))) or "none"
    raise WeightsError(
        f"model: {str(name_or_folder)!r} is neither shipped weights ({shipped}) nor a folder with weights.safetensors"
    )


def _as_batch(audio: np.ndarray | Tensor) -> np.ndarray:
    """(B, C, T) float32, checked."""
    floating = audio.is_floating_point() if isinstance(audio, Tensor) else np.issubdtype(audio.dtype, np.floating)
    if not floating:
        raise ValueError(
            f"audio: dtype {audio.dtype} given; floating samples in [-1, 1] are wanted (int16: divide by 32768)"
        )
    if not 1 <= audio.ndim <= 3 or 0 in audio.shape:
        raise ValueError(
            f"audio: shape {tuple(audio.shape)} given; (T,), (C, T) or (B, C, T) with at least one sample is wanted"
        )
    x = audio.detach().cpu().float().numpy() if isinstance(audio, Tensor) else audio.astype(np.float32, copy=False)
    if not np.isfinite(x).all():
        raise ValueError(
            f"audio: {np.count_nonzero(~np.isfinite(x))} samples are NaN or infinite; see numpy.nan_to_num"
        )
    return x.reshape((1,) * (3 - x.ndim) + x.shape)
