"""The echo canceller for users: microphone and reference of any rate and length in, the near end out.

Shapes: B clips, C channels, T samples of the microphone, T' of the reference.
"""

import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from allears.audio.formats import matching_subtype
from allears.audio.resample import fit_length
from allears.audio.session import Session, as_batch, as_given
from allears.audio.writer import AudioWriter
from allears.core.device import resolve_device
from allears.core.progress import OnProgress, Progress
from allears.core.weights import check_keys, load_pretrained
from allears.models.echo.config import EchoConfig
from allears.models.echo.files import BLOCK_FRAMES, opened
from allears.models.echo.model import EchoNet
from allears.models.echo.result import EchoResult, Kept
from allears.models.echo.stream import EchoCore, EchoSession, Network, OnFacts
from allears.nn.causal import fuse_norms

DEFAULT = "echo-16k"
Runtime = Literal["pytorch", "onnx"]
"""What runs the network: PyTorch on any device, or onnxruntime on one thread of the CPU."""


class EchoCanceller:
    """Takes what a loudspeaker plays out of what a microphone hears, and noise with it.

    >>> canceller = EchoCanceller.from_pretrained()
    >>> near = canceller(mic, reference, sample_rate_hz=48_000)
    >>> session = canceller.stream(sample_rate_hz=48_000)
    >>> near_chunk = session.push(mic_chunk, reference_chunk)

    Args:
        net: a trained network; see :meth:`from_pretrained`. It stays as it is: a copy of it runs, with its batch norms
            worked in.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        name: shown in reports.
        runtime: ``pytorch``, or ``onnx`` for onnxruntime on the CPU (extra ``[onnx]``); both give the same.

    Raises:
        ValueError: a device or runtime that is none, or that do not go together.
        MissingDependencyError: ``onnx`` or ``onnxruntime`` is not installed.
    """

    def __init__(
        self, net: EchoNet, device: str | torch.device = "auto", name: str = "custom", runtime: Runtime = "pytorch"
    ) -> None:
        if runtime not in ("pytorch", "onnx"):
            raise ValueError(f"runtime: {runtime!r} given; pytorch or onnx is wanted")
        self.device = resolve_device("cpu" if runtime == "onnx" and device == "auto" else device)
        if runtime == "onnx" and self.device.type != "cpu":
            raise ValueError(f"device: {self.device} given; the runtime onnx is for the CPU, pytorch for all others")
        self.net = deepcopy(net).to(self.device).eval().requires_grad_(False)
        fuse_norms(self.net)
        self.config: EchoConfig = net.config
        self.name, self.runtime = name, runtime
        self._engine: Network = self.net
        if runtime == "onnx":
            from allears.models.echo.export import as_onnx

            self._engine = as_onnx(self.net)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = DEFAULT,
        device: str | torch.device = "auto",
        *,
        voice_gate: bool | None = None,
        runtime: Runtime = "pytorch",
    ) -> "EchoCanceller":
        """Load shipped weights by name, or your own from a folder (with ``weights.safetensors`` and
        ``weights.json``) or a path stem.

        Args:
            name_or_folder: of the weights.
            device: ``auto``, ``cpu``, ``cuda`` or a torch device.
            voice_gate: close the output where nobody at the near end speaks; the default is the model's own.
            runtime: ``pytorch`` or ``onnx``.

        Raises:
            WeightsError: nothing is found there, or it is corrupt or of another model.
        """
        found = load_pretrained(name_or_folder, "echo", EchoConfig)
        config = found.config if voice_gate is None else replace(found.config, voice_gate=voice_gate)
        net = EchoNet(config)
        check_keys(net, found.tensors)
        net.load_state_dict(found.tensors)
        return cls(net, device, found.name, runtime)

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
        return EchoSession(self._engine, channels, sample_rate_hz, patience_s, on_facts)

    def process_file(
        self,
        mic: str | Path,
        reference: str | Path | None,
        dst: str | Path,
        *,
        reference_channel: int | None = None,
        on_progress: OnProgress | None = None,
        block_frames: int = BLOCK_FRAMES,
    ) -> EchoResult:
        """Cancel the echo in a file, in bounded memory whatever its length (facts aside: 1.2 kB a second).

        Both files begin at the same time. A reference that ends early is silent from there on, and what it has more
        than the microphone is not used; :attr:`EchoResult.notes` and the log tell that, and what lengths that differ
        by less than 1 % say about the clocks.

        Args:
            mic: what the microphone heard; each channel for itself.
            reference: what was played, of any rate, length and channel count; its channels are averaged. ``None``: it
                is a channel of ``mic``.
            dst: gets rate, length and, where its format allows, bit depth of ``mic``, and a channel for each
                microphone; it appears under its name only when it is complete.
            reference_channel: for ``reference=None``: which channel of ``mic``, from 1; the others are microphones. By
                default ``mic`` is stereo, and the second channel is it.
            on_progress: is told how many seconds are finished.
            block_frames: samples that are read at once, 1 or more; the result does not depend on it.

        Raises:
            AudioFileError: a file cannot be read or ``dst`` cannot be written, or ``mic`` has not the channels wanted.
            ValueError: files or options that do not go together.
        """
        begun, done = time.perf_counter(), 0
        kept = Kept(self.config.hop_s)
        with opened(mic, reference, reference_channel, block_frames) as recording:
            info, name = recording.info, Path(mic).name
            for source in (mic, reference):
                if source is not None and Path(dst).exists() and Path(dst).samefile(source):
                    raise ValueError(f"dst: {dst} is an input; give the output a name of its own")
            session = self._session(recording.mics, 1, info.sample_rate_hz, kept.push)
            subtype = matching_subtype(info, Path(dst).suffix)
            with AudioWriter(dst, info.sample_rate_hz, recording.mics, subtype, info.frames) as writer:
                for both in recording:
                    done += both.shape[1]
                    writer.write(session.push(both))
                    if on_progress is not None:
                        on_progress(Progress(done / info.sample_rate_hz, info.duration_s, "s", name))
                writer.write(session.flush())
        return EchoResult(
            done / info.sample_rate_hz,
            time.perf_counter() - begun,
            info.sample_rate_hz,
            recording.mics,
            done,
            kept.facts(),
            self.config.hop_s,
            kept.alignment(),
            tuple(recording.notes),
        )

    def _session(self, mics: int, references: int, rate: int, on_facts: OnFacts | None) -> Session:
        core = EchoCore(self._engine, mics, references, on_facts)
        return Session(core, mics + references, mics, rate, self.config.sample_rate_hz)


def _checked(audio: np.ndarray | Tensor, name: str) -> np.ndarray:
    """:func:`as_batch`, whose errors name the argument."""
    try:
        return as_batch(audio)
    except ValueError as error:
        raise ValueError(str(error).replace("audio:", f"{name}:", 1)) from None
