"""The transform of :mod:`allears.audio.stft`, a chunk at a time. The state is a value that the caller keeps.

For any way of cutting a signal into chunks, the frames (or samples) of all steps and of the flush, put one after
another, equal those of :meth:`Stft.forward` (or :meth:`Stft.inverse`) up to float32 rounding.

Shapes: c samples in a chunk, F bins, n frames that a step completes (0 too); "..." is the batch, constant in a stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from allears.audio.stft import Stft


def latency_samples(stft: Stft) -> int:
    """Samples by which analysis followed by synthesis lags, at worst: n_fft - 1.

    After R samples in, at least ``R - latency_samples`` samples are out, and for some R it is exactly that many. With
    chunks of ``hop`` samples a listener hears ``n_fft`` samples of delay, the time to fill a chunk included.
    """
    return stft.n_fft - 1


@dataclass(frozen=True)
class AnalysisState:
    """``pending`` (..., p): samples that later frames still need. ``received`` and ``emitted``: samples and frames."""

    pending: Tensor
    received: int = 0
    emitted: int = 0


@dataclass(frozen=True)
class SynthesisState:
    """``total`` (..., p) and ``weight`` (p,): the unfinished overlap-add. ``skip``: leading samples not to emit.

    ``emitted``: samples given out so far.
    """

    total: Tensor
    weight: Tensor
    skip: int
    emitted: int = 0


def analysis_init(stft: Stft, batch: Sequence[int] = (), device: torch.device | str = "cpu") -> AnalysisState:
    """The state before the first chunk, for chunks of shape (*batch, c)."""
    return AnalysisState(torch.zeros(*batch, stft.n_fft // 2, device=device))


def analysis_step(stft: Stft, state: AnalysisState, chunk: Tensor) -> tuple[Tensor, AnalysisState]:
    """Chunk (..., c), c >= 0, to the frames that it completes, (..., F, n) complex64, and the next state."""
    pending = torch.cat([state.pending, chunk.to(torch.float32)], dim=-1)
    count = max(0, (pending.shape[-1] - stft.n_fft) // stft.hop + 1)
    received = state.received + chunk.shape[-1]
    if count == 0:
        return _no_frames(stft, pending), AnalysisState(pending, received, state.emitted)
    frames = stft.transform_frames(pending)
    return frames, AnalysisState(pending[..., count * stft.hop :].clone(), received, state.emitted + count)


def analysis_flush(stft: Stft, state: AnalysisState) -> Tensor:
    """The frames (..., F, n) that are left when the signal is at its end; none where no sample came."""
    if state.received == 0:
        return _no_frames(stft, state.pending)
    count = stft.frames(state.received) - state.emitted
    wanted = (count - 1) * stft.hop + stft.n_fft
    return stft.transform_frames(functional.pad(state.pending, (0, wanted - state.pending.shape[-1])))


def synthesis_init(stft: Stft, batch: Sequence[int] = (), device: torch.device | str = "cpu") -> SynthesisState:
    """The state before the first frame, for spectra of shape (*batch, F, n)."""
    tail = stft.n_fft - stft.hop
    return SynthesisState(torch.zeros(*batch, tail, device=device), torch.zeros(tail, device=device), stft.n_fft // 2)


def synthesis_step(stft: Stft, state: SynthesisState, frames: Tensor) -> tuple[Tensor, SynthesisState]:
    """Frames (..., F, n), n >= 0, to the samples that they finish, (..., s) float32, and the next state.

    Give the last frames, those of :func:`analysis_flush`, to :func:`synthesis_flush`: they may reach past the end.
    """
    count = frames.shape[-1]
    if count == 0:
        return state.total[..., :0], state
    total, weight = stft.overlap_add(frames)
    tail = stft.n_fft - stft.hop
    total = total + functional.pad(state.total, (0, count * stft.hop))
    weight = weight + functional.pad(state.weight, (0, count * stft.hop))
    done = total.shape[-1] - tail
    skipped = min(state.skip, done)
    samples = total[..., skipped:done] / weight[skipped:done]
    state = SynthesisState(
        total[..., done:].clone(), weight[done:].clone(), state.skip - skipped, state.emitted + done - skipped
    )
    return samples, state


def synthesis_flush(stft: Stft, state: SynthesisState, length: int, frames: Tensor | None = None) -> Tensor:
    """The last samples (..., s), so that the whole stream has exactly ``length``.

    Args:
        stft: the transform.
        state: that after the last :func:`synthesis_step`.
        length: samples in the whole stream.
        frames: the last frames, those of :func:`analysis_flush`, (..., F, n); they may reach past ``length``.

    Raises:
        ValueError: more samples than ``length`` are out already, or all frames together do not reach it.
    """
    if state.emitted > length:
        raise ValueError(
            f"length: {length} wanted, but {state.emitted} samples are out; give the last frames to frames="
        )
    samples = state.total[..., :0]
    if frames is not None:
        samples, state = synthesis_step(stft, state, frames)
    given = (state.emitted + stft.n_fft // 2 - state.skip) // stft.hop
    if length and given < stft.frames(length):
        raise ValueError(f"frames: {length} samples need {stft.frames(length)} frames, {given} came in all")
    left = length - state.emitted
    if left <= 0:
        return samples[..., : samples.shape[-1] + left]
    tail = slice(state.skip, state.skip + left)
    return torch.cat([samples, state.total[..., tail] / state.weight[tail]], dim=-1)


def _no_frames(stft: Stft, like: Tensor) -> Tensor:
    return torch.zeros(*like.shape[:-1], stft.bins, 0, dtype=torch.complex64, device=like.device)
