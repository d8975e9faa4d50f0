"""Losses of separation that do not care which output holds which talker.

Shapes: B clips, J outputs, S samples, P = J! permutations, R auxiliary heads.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Literal, get_args

import torch
from torch import Tensor

Measure = Literal["si_snr", "snr", "both"]
_EPS = 1e-8


@dataclass(frozen=True)
class SeparateLoss:
    """What is minimised.

    Args:
        measure: ``si_snr``, which ignores the level of an output, as the published systems train; ``snr``, which
            teaches the level too, and which silent outputs need; or ``both``, their mean: by SNR alone a network that
            cannot tell the talkers apart yet gains 3 dB by half the mixture in each output, and is slow to leave that.
        ceiling_db: no clip is pushed beyond this: the error is measured over a floor this far under the target
            (Wisdom et al., "What's all the fuss about free universal sound separation data?", ICASSP 2021, eq. 2).
        silent_db: an output without a talker is pushed to this far under the mixture (the same paper, eq. 3).
        auxiliary: weight of the auxiliary heads' mean at the start; the main loss has the rest (SepReformer's code).
        auxiliary_from, auxiliary_decay: from this share of the run on, the weight falls, to this share of it at the
            end, geometrically (the released schedule falls by 0.8 every 5 of the last 100 of 200 epochs).
        n_fft, hop: STFT of the auxiliary loss, in samples.
    """

    measure: Measure = "si_snr"
    ceiling_db: float = 30.0
    silent_db: float = 20.0
    auxiliary: float = 0.4
    auxiliary_from: float = 0.5
    auxiliary_decay: float = 0.0115
    n_fft: int = 512
    hop: int = 128

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure: {self.measure!r} given; it must be 'si_snr', 'snr' or 'both'")
        if not 0 <= self.auxiliary < 1:
            raise ValueError(f"auxiliary: {self.auxiliary} given; it must be at least 0 and below 1")

    def auxiliary_weight(self, progress: float) -> float:
        """Of the auxiliary heads, at ``progress`` in [0, 1] of the run."""
        late = max(0.0, progress - self.auxiliary_from) / max(1e-9, 1 - self.auxiliary_from)
        return self.auxiliary * self.auxiliary_decay ** min(1.0, late)


def pair_losses(estimates: Tensor, sources: Tensor, mixture_power: Tensor, loss: SeparateLoss) -> Tensor:
    """Loss in dB of each output as each source, (B, J, J): output i as source j.

    Args:
        estimates, sources: (B, J, ...), any number of further axes; compared in float32.
        mixture_power: (B,), the sum of squares of the mixture in the same domain: what a silent output is measured by.
    """
    estimate, source = estimates.flatten(2).float(), sources.flatten(2).float()
    product = torch.einsum("bis,bjs->bij", estimate, source)
    own, wanted = estimate.square().sum(-1)[:, :, None], source.square().sum(-1)[:, None]
    floor, active = 10 ** (-loss.ceiling_db / 10), []
    if loss.measure != "snr":
        # |a s - e|^2 with a = <e, s> / |s|^2, over |a s|^2
        target = product.square() / wanted.clamp_min(_EPS)
        active.append(_decibels((own - target).clamp_min(0) + floor * target, target))
    if loss.measure != "si_snr":
        target = wanted.expand_as(product)
        active.append(_decibels((own + wanted - 2 * product).clamp_min(0) + floor * target, target))
    power = mixture_power.float()[:, None, None]
    quiet = _decibels(own + 10 ** (-loss.silent_db / 10) * power, power).expand_as(product)
    return torch.where(_heard(wanted, power), sum(active) / len(active), quiet)


def _decibels(part: Tensor, whole: Tensor) -> Tensor:
    return 10 * torch.log10((part + _EPS) / (whole + _EPS))


def _heard(wanted: Tensor, power: Tensor) -> Tensor:
    """Which sources are there: within 60 dB of the mixture."""
    return wanted > 1e-6 * power


def best_permutations(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """pairs (B, J, J) to the lowest mean loss (B,) and, for each source, the output that holds it, (B, J)."""
    count = pairs.shape[1]
    orders = torch.tensor(list(permutations(range(count))), device=pairs.device)  # (P, J): output of source j
    means = pairs[:, orders, torch.arange(count, device=pairs.device)].mean(-1)
    best = means.argmin(1)
    return means.gather(1, best[:, None])[:, 0], orders[best]


def separation_loss(
    outputs: Tensor,
    auxiliaries: list[Tensor],
    sources: Tensor,
    mixture: Tensor,
    loss: SeparateLoss,
    progress: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Utterance-level permutation-invariant loss of the output and of the auxiliary heads.

    The heads are compared on STFT magnitudes, each with its own permutation (SepReformer's code).

    Args:
        outputs: (B, J, S).
        auxiliaries: R of (B, J, S).
        sources: (B, J, S); a silent row is a talker who is not there.
        mixture: (B, S).
        progress: of the run, in [0, 1].

    Returns:
        The loss (), and its parts ().
    """
    power = mixture.float().square().sum(-1)
    main = best_permutations(pair_losses(outputs, sources, power, loss))[0].mean()
    parts = {"main": main.detach()}
    if not auxiliaries or not loss.auxiliary:
        return main, parts
    wanted = magnitudes(sources, loss)
    loud = magnitudes(mixture, loss).square().sum((-2, -1))
    heads = [
        best_permutations(pair_losses(magnitudes(head, loss), wanted, loud, loss))[0].mean() for head in auxiliaries
    ]
    auxiliary = torch.stack(heads).mean()
    weight = loss.auxiliary_weight(progress)
    return (1 - weight) * main + weight * auxiliary, {**parts, "auxiliary": auxiliary.detach()}


def magnitudes(waveforms: Tensor, loss: SeparateLoss) -> Tensor:
    """(..., S) to STFT magnitudes (..., bins, frames), in float32."""
    flat = waveforms.float().reshape(-1, waveforms.shape[-1])
    window = torch.hann_window(loss.n_fft, device=flat.device)
    spectrum = torch.stft(flat, loss.n_fft, loss.hop, window=window, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1)  # its gradient is one product; that of parts fills zeros
    return (power + 1e-12).sqrt().reshape(*waveforms.shape[:-1], *spectrum.shape[-2:])


def si_snr_improvement_db(outputs: Tensor, sources: Tensor, mixture: Tensor) -> Tensor:
    """Mean over the talkers who are there of the SI-SNR in dB under the best permutation, less the mixture's; (B,).

    Means are taken off, as the field's tools do.
    """
    out, ref, mix = (x.float() - x.float().mean(-1, keepdim=True) for x in (outputs, sources, mixture))
    plain = SeparateLoss(ceiling_db=100.0)
    power = mix.square().sum(-1)
    pairs = -pair_losses(out, ref, power, plain)
    heard = _heard(ref.square().sum(-1), power[:, None])  # (B, J)
    gain = torch.where(heard[:, None], pairs, 0.0)
    _, order = best_permutations(-gain)
    chosen = gain.gather(1, order[:, None])[:, 0]  # (B, J): of source j
    before = -pair_losses(mix[:, None].expand_as(ref), ref, power, plain).diagonal(dim1=1, dim2=2)
    total = torch.where(heard, chosen - before, 0.0).sum(-1)
    return total / heard.sum(-1).clamp_min(1)
