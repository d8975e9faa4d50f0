"""Training losses of the echo canceller, as functions of tensors.

Shapes: B clips, S samples, T frames, F bins, D delays, W pieces of 100 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.audio.stft import Stft
from allears.models.echo.model import EchoOutput

_QUIET_PIECE = 1_600  # samples
_SILENT = 1e-5  # of a piece's microphone: -50 dB; a target below it counts as silence
_LOWEST = 1e-6  # -60 dB; deeper silence earns nothing more
_EPS = 1e-6
_STFT = Stft(320, 160)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms.

    Args:
        stages: of the stages, in the order of progress, the last one last; a network with fewer takes the last ones,
            brought to the same sum.
        complex: share of the complex error in the spectral loss; the rest is that of magnitudes.
        over: of what is taken away too much, in the spectral loss.
        quiet: of the output's level where the target is silent, in dB of the microphone's. Ten times as much, and the
            network learns to be silent everywhere first.
        waveform: of the error of the waveform, in dB of the target, in clips whose target is not silent.
        reverberation: share of the late reverberation that the last target keeps; 0 asks for the first 50 ms alone, as
            published, 1 leaves the near end's room as it is.
        alignment, voice: of these losses.
        power: magnitudes are compressed to |X|^power.
    """

    stages: tuple[float, ...] = (0.3, 0.7)
    complex: float = 0.3
    over: float = 0.5
    quiet: float = 0.0003
    waveform: float = 0.0
    reverberation: float = 0.0
    alignment: float = 0.1
    voice: float = 0.1
    power: float = 0.3


def progressive_targets(
    near: Tensor,
    near_reverberant: Tensor,
    echo: Tensor,
    noise: Tensor,
    echo_left_db: float = -15.0,
    reverberation: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What each stage should give: first the recording with its echo so many dB quieter, then the near end, with this
    share of its late reverberation."""
    first = near_reverberant + noise + 10.0 ** (echo_left_db / 20.0) * echo
    return first, torch.lerp(near, near_reverberant, reverberation) if reverberation else near


def spectral_loss(
    estimate: Tensor,
    target: Tensor,
    level: Tensor,
    stft: Stft,
    complex_share: float = 0.3,
    over: float = 0.5,
    power: float = 0.3,
) -> Tensor:
    """Squared errors of compressed spectra, a mean over clips, frames and bins.

    With Y = |Y|^power and its phase: (1 - a) (|Y| - |S|)^2 + a |Y - S|^2 + o max(|S| - |Y|, 0)^2. The last term makes
    it dearer to take the talker away than to leave some echo (Eskimez et al., 2022).

    Args:
        estimate, target: (B, S); the target may be silent.
        level: (B,), root mean square of the clip's microphone: loud and quiet clips count the same.
        stft: of the loss.
        complex_share, over: a and o.
        power: of the magnitudes.
    """
    scale = (1.0 / level.clamp_min(1e-5))[:, None]
    (y, y_size), (s, s_size) = (_compressed(x.float() * scale, stft, power) for x in (estimate, target))
    size_error = y_size - s_size
    errors = (1.0 - complex_share) * size_error.square() + over * (-size_error).clamp_min(0.0).square()
    return (errors + complex_share * (y - s).square().sum(-1)).mean()


def _compressed(x: Tensor, stft: Stft, power: float) -> tuple[Tensor, Tensor]:
    """(B, S) to the compressed spectrum (B, F, T, 2) and its magnitude (B, F, T); noise of level 1 has size 1."""
    parts = torch.view_as_real(stft.forward(x)) * (2.0 / stft.n_fft) ** 0.5
    energy = parts.square().sum(-1) + _EPS
    return parts * energy.pow(0.5 * (power - 1.0))[..., None], energy.pow(0.5 * power)


def quiet_level_db(estimate: Tensor, target: Tensor, mic: Tensor) -> Tensor:
    """How loud the output is where the target is silent: a mean over pieces of 100 ms, in dB of the microphone there.

    It lies between -60 and about 0 dB; pieces in which the microphone is silent too do not count. 0 where there are no
    such pieces. SI-SDR, which is of no use here, is not needed then.

    Args:
        estimate, target, mic: (B, S).
    """
    size = min(_QUIET_PIECE, mic.shape[-1])
    out, wanted, heard = (x.float().unfold(-1, size, size).square().mean(-1) for x in (estimate, target, mic))
    counts = ((wanted <= _SILENT * heard) & (heard > 1e-10)).float()
    level = 10.0 * torch.log10(out / heard.clamp_min(1e-10) + _LOWEST)
    return (level * counts).sum() / counts.sum().clamp_min(1.0)


def waveform_level_db(estimate: Tensor, target: Tensor, mic: Tensor, ceiling_db: float = 30.0) -> Tensor:
    """Energy of the error over that of the target in dB, a mean over clips whose target is heard; it ends so many dB
    below the target. 0 where there are no such clips.

    Args:
        estimate, target, mic: (B, S).
    """
    wanted, error = (x.float().square().sum(-1) for x in (target, estimate.float() - target.float()))
    counts = (wanted > _SILENT * mic.float().square().sum(-1)).float()
    floor = 10.0 ** (-ceiling_db / 10.0)
    level = 10.0 * torch.log10(error / wanted.clamp_min(1e-10) + floor)
    return (level * counts).sum() / counts.sum().clamp_min(1.0)


def alignment_loss(alignment: Tensor, delay_frames: Tensor, far_active: Tensor, within: int = 1) -> Tensor:
    """Minus log of the attention within some frames of the true delay, a mean over frames in which the far end is
    active and its delay can be told by the network; 0 where there are none.

    Args:
        alignment: (B, T, D), softmax over the delays.
        delay_frames: (B, T) true delays, in frames, rounded here; negative or NaN where there is none.
        far_active: (B, T), whether the far end is heard.
        within: frames to either side that count as right.
    """
    frames = _same_frames(alignment.shape[1], delay_frames, "delay_frames")
    alignment = alignment[:, :frames].float()
    delays = alignment.shape[-1]
    true = delay_frames[:, :frames].float().nan_to_num(nan=-1.0).round()
    counts = (far_active[:, :frames].bool() & (true >= 0) & (true < delays)).float()
    apart = (torch.arange(delays, device=alignment.device) - true[..., None]).abs()
    caught = (alignment * (apart <= within)).sum(-1)
    return -((caught + 1e-6).log() * counts).sum() / counts.sum().clamp_min(1.0)


def voice_loss(logits: Tensor, voice: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, T) and near-end activity (B, T), a mean over frames."""
    frames = _same_frames(logits.shape[1], voice, "voice")
    return F.binary_cross_entropy_with_logits(logits[:, :frames].float(), voice[:, :frames].float())


def _same_frames(frames: int, labels: Tensor, name: str) -> int:
    """The network makes one frame more than there are hops, and labels may stop before it or count a broken hop."""
    if abs(frames - labels.shape[1]) > 2:
        raise ValueError(f"{name}: {labels.shape[1]} frames given, the network made {frames}; wanted one a hop")
    return min(frames, labels.shape[1])


def echo_loss(
    output: EchoOutput,
    mic: Tensor,
    targets: Sequence[Tensor],
    delay_frames: Tensor,
    far_active: Tensor,
    voice: Tensor,
    weights: LossWeights = LossWeights(),
    stft: Stft = _STFT,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch, and its terms.

    Behind the gate (``output.near``) is what the last target is compared with, so that the gate is trained where it is
    on.

    Args:
        output: of the network.
        mic: (B, S).
        targets: (B, S) each, as :func:`progressive_targets`; a network with fewer stages takes the last ones.
        delay_frames, far_active, voice: (B, T), as in :func:`alignment_loss` and :func:`voice_loss`.
        weights: of the terms.
        stft: of the spectral loss.

    Raises:
        ValueError: fewer targets or weights than stages, or labels of another number of frames.
    """
    count = len(output.stages)
    if len(targets) < count or len(weights.stages) < count:
        raise ValueError(
            f"targets, weights.stages: {len(targets)} and {len(weights.stages)} given; {count} stages want one each"
        )
    shares = [value / sum(weights.stages[-count:]) * sum(weights.stages) for value in weights.stages[-count:]]
    level = mic.float().square().mean(-1).sqrt()
    estimates = (*output.stages[:-1], output.near)
    terms = {
        f"stage_{number}": spectral_loss(estimate, target, level, stft, weights.complex, weights.over, weights.power)
        for number, (estimate, target) in enumerate(zip(estimates, targets[-count:], strict=True), 1)
    }
    total = sum((share * term for share, term in zip(shares, terms.values(), strict=True)), mic.new_zeros(()))
    terms["quiet_db"] = quiet_level_db(output.near, targets[-1], mic)
    total = total + weights.quiet * terms["quiet_db"]
    if weights.waveform:
        terms["waveform_db"] = waveform_level_db(output.near, targets[-1], mic)
        total = total + weights.waveform * terms["waveform_db"]
    if output.alignment is not None:
        terms["alignment"] = alignment_loss(output.alignment, delay_frames, far_active)
        total = total + weights.alignment * terms["alignment"]
    if output.voice is not None:
        terms["voice"] = voice_loss(output.voice, voice)
        total = total + weights.voice * terms["voice"]
    return total, {name: term.detach() for name, term in terms.items()}
