"""The echo canceller for users: microphone and reference of any rate and length in, the near end out.

Shapes: B clips, C channels, T samples of the microphone, T' of the reference.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.audio.files import AudioReader
from allears.audio.formats import matching_subtype
from allears.audio.resample import StreamResampler, fit_length
from allears.audio.session import Session, as_batch, as_given
from allears.audio.writer import AudioWriter
from allears.core.device import resolve_device
from allears.core.errors import AudioFileError
from allears.core.progress import OnProgress, Progress
from allears.core.weights import check_keys, load_pretrained
from allears.models.echo.config import EchoConfig
from allears.models.echo.model import EchoNet
from allears.models.echo.stream import EchoCore, EchoSession, Facts, OnFacts
from allears.nn.causal import fuse_norms

DEFAULT = "echo-base"
_BLOCK_FRAMES = 65_536


@dataclass(frozen=True, eq=False)
class EchoResult:
    """What :meth:`EchoCanceller.process_file` did. ``facts`` are those of the first microphone channel, (1, frames)."""

    duration_s: float
    elapsed_s: float
    sample_rate_hz: int
    channels: int
    frames: int
    facts: Facts

    @property
    def rtf(self) -> float:
        """Real-time factor: processing time over duration."""
        return self.elapsed_s / self.duration_s if self.duration_s else 0.0


class EchoCanceller:
    """Takes what a loudspeaker plays out of what a microphone hears; with it noise and late reverberation.

    >>> canceller = EchoCanceller.from_pretrained()
    >>> near = canceller(mic, reference, sample_rate_hz=48_000)
    >>> session = canceller.stream(sample_rate_hz=48_000)
    >>> near_chunk = session.push(mic_chunk, reference_chunk)

    Args:
        net: a trained network; see :meth:`from_pretrained`. It stays as it is: a copy of it runs, with its batch norms
            worked in.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        name: shown in reports.
    """

    def __init__(self, net: EchoNet, device: str | torch.device = "auto", name: str = "custom") -> None:
        self.device = resolve_device(device)
        self.net = deepcopy(net).to(self.device).eval().requires_grad_(False)
        fuse_norms(self.net)
        self.config: EchoConfig = net.config
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = DEFAULT,
        device: str | torch.device = "auto",
        *,
        voice_gate: bool | None = None,
    ) -> "EchoCanceller":
        """Load shipped weights by name, or your own from a folder (with ``weights.safetensors`` and
        ``weights.json``) or a path stem.

        Args:
            name_or_folder: of the weights.
            device: ``auto``, ``cpu``, ``cuda`` or a torch device.
            voice_gate: close the output where nobody at the near end speaks; the default is the model's own.

        Raises:
            WeightsError: nothing is found there, or it is corrupt or of another model.
        """
        found = load_pretrained(name_or_folder, "echo", EchoConfig)
        config = found.config if voice_gate is None else replace(found.config, voice_gate=voice_gate)
        net = EchoNet(config)
        check_keys(net, found.tensors)
        net.load_state_dict(found.tensors)
        return cls(net, device, found.name)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def latency_ms(self) -> float:
        """Of a stream at the network's rate, the time to fill a hop included; see :attr:`EchoSession.latency_ms`."""
        return self.config.latency_ms

    def __call__(
        self,
        mic: np.ndarray | Tensor,
        reference: np.ndarray | Tensor,
        sample_rate_hz: int,
        *,
        on_facts: OnFacts | None = None,
    ) -> Any:
        """Cancel the echo in a recording.

        Args:
            mic: (T,), (C, T) or (B, C, T), floating, nominally in [-1, 1]; an array or a tensor.
            reference: what was played. (T',): the same for all microphones; (C, T') or (B, C, T'): one for each, where
                C may also be 1. What is missing at its end is silent, what is too much is left out.
            sample_rate_hz: of both, 4,000 to 384,000.
            on_facts: is told what is found in the course of it: delays, and voice.

        Returns:
            The near end; kind, shape and rate as of ``mic``.

        Raises:
            ValueError: not floating, not finite, empty, or of shapes that do not belong together.
        """
        x, r = _checked(mic, "mic"), _checked(reference, "reference")
        if reference.ndim > max(2, mic.ndim) or r.shape[0] not in (1, x.shape[0]) or r.shape[1] not in (1, x.shape[1]):
            raise ValueError(
                f"reference: shape {tuple(reference.shape)} given for microphones {tuple(mic.shape)}; one channel, or "
                "as many as the microphone has, is wanted: mix a stereo reference with reference.mean(0)"
            )
        length = x.shape[2]
        r = fit_length(r, length)
        if r.shape[0] * r.shape[1] > 1:
            r = np.broadcast_to(r, x.shape)
        flat = np.concatenate([x.reshape(-1, length), r.reshape(-1, length)])
        mics = x.shape[0] * x.shape[1]
        session = self._session(mics, len(flat) - mics, sample_rate_hz, on_facts)
        y = np.concatenate([session.push(flat), session.flush()], axis=1).reshape(mic.shape)
        return as_given(y, mic)

    def stream(
        self,
        sample_rate_hz: int,
        *,
        channels: int = 1,
        patience_s: float = 0.2,
        on_facts: OnFacts | None = None,
    ) -> EchoSession:
        """A live session; see :class:`EchoSession` for its arguments and for what it does with chunks that differ."""
        return EchoSession(self.net, channels, sample_rate_hz, patience_s, on_facts)

    def process_file(
        self,
        mic: str | Path,
        reference: str | Path | None,
        dst: str | Path,
        *,
        on_progress: OnProgress | None = None,
    ) -> EchoResult:
        """Cancel the echo in a file, in bounded memory whatever its length (facts aside: 1.2 kB a second).

        Args:
            mic: what the microphone heard; each channel for itself.
            reference: what was played, of any rate and length; its channels are averaged. Both begin at the same time;
                what is missing at its end is silent. ``None``: ``mic`` has two channels, and the second is the
                reference.
            dst: gets rate, length and, where its format allows, bit depth of ``mic``; it appears under its name only
                when it is complete.
            on_progress: is told how far it is.

        Raises:
            AudioFileError: a file cannot be read or ``dst`` cannot be written, or ``mic`` has not two channels where
                they are wanted.
        """
        facts: list[Facts] = []
        begun, done = time.perf_counter(), 0
        with ExitStack() as stack:
            reader = stack.enter_context(AudioReader(mic, block_frames=_BLOCK_FRAMES))
            info, played = reader.info, None
            if reference is not None:
                played = _Played(stack.enter_context(AudioReader(reference, _BLOCK_FRAMES)), info.sample_rate_hz)
            elif info.channels != 2:
                raise AudioFileError(
                    f"{mic}: has {info.channels} channels; name a reference too, or give a stereo file with the "
                    "microphone left and the reference right"
                )
            mics = info.channels if played is not None else 1
            session = self._session(mics, 1, info.sample_rate_hz, lambda found: facts.append(_of_first(found)))
            subtype = matching_subtype(info, Path(dst).suffix)
            writer = stack.enter_context(AudioWriter(dst, info.sample_rate_hz, mics, subtype, info.frames))
            for block in reader:
                done += block.shape[1]
                both = block if played is None else np.concatenate([block, played.take(block.shape[1])])
                writer.write(session.push(both))
                if on_progress is not None:
                    on_progress(Progress(done / info.sample_rate_hz, info.duration_s, "s", Path(mic).name))
            writer.write(session.flush())
        return EchoResult(
            done / info.sample_rate_hz,
            time.perf_counter() - begun,
            info.sample_rate_hz,
            mics,
            done,
            _joined(facts),
        )

    def _session(self, mics: int, references: int, rate: int, on_facts: OnFacts | None) -> Session:
        core = EchoCore(self.net, mics, references, on_facts)
        return Session(core, mics + references, mics, rate, self.config.sample_rate_hz)


class _Played:
    """The reference's file as one channel at the microphone's rate, silent behind its end."""

    def __init__(self, reader: AudioReader, rate_hz: int) -> None:
        self._blocks: Iterator[np.ndarray] = iter(reader)
        self._resampler = StreamResampler(1, reader.info.sample_rate_hz, rate_hz)
        self._waiting = np.zeros((1, 0), np.float32)
        self._over = False

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` samples, (1, count)."""
        while self._waiting.shape[1] < count and not self._over:
            block = next(self._blocks, None)
            self._over = block is None
            new = self._resampler.flush() if block is None else self._resampler.push(block.mean(0, keepdims=True))
            self._waiting = np.concatenate([self._waiting, new], axis=1)
        taken, self._waiting = self._waiting[:, :count], self._waiting[:, count:]
        return fit_length(taken, count)


def _checked(audio: np.ndarray | Tensor, name: str) -> np.ndarray:
    """:func:`as_batch`, whose errors name the argument."""
    try:
        return as_batch(audio)
    except ValueError as error:
        raise ValueError(str(error).replace("audio:", f"{name}:", 1)) from None


def _of_first(facts: Facts) -> Facts:
    return Facts(
        *(None if value is None else value[:1].copy() for value in (facts.delay_ms, facts.confidence, facts.voice))
    )


def _joined(facts: list[Facts]) -> Facts:
    def join(values: list[np.ndarray | None]) -> np.ndarray | None:
        kept = [value for value in values if value is not None]
        return np.concatenate(kept, axis=1) if kept else None

    return Facts(join([f.delay_ms for f in facts]), join([f.confidence for f in facts]), join([f.voice for f in facts]))
