"""Scale-invariant signal-to-distortion ratio. Le Roux, Wisdom, Erdogan, Hershey, "SDR - half-baked or well done?",
ICASSP 2019, equation 5 (no mean is taken off, as in the paper's definition)."""

from typing import TYPE_CHECKING, overload

import numpy as np

from .reasons import unscored

if TYPE_CHECKING:
    import torch


@overload
def si_sdr_db(estimate: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor": ...
@overload
def si_sdr_db(estimate: np.ndarray, reference: np.ndarray) -> "float | np.ndarray": ...
def si_sdr_db(estimate, reference):
    """SI-SDR in dB, computed in float64.

    Args:
        estimate: (..., T), numpy or torch.
        reference: the same shape and kind.

    Returns:
        (...) in float64: a float for one numpy clip, an array for a batch, a tensor (with gradients) for tensors.
        An exact multiple of the reference gives inf (or some 300 dB of rounding), an estimate with nothing of the
        reference in it (silence too) gives -inf, a silent reference gives NaN.

    Raises:
        ValueError: the shapes differ, or there is no sample.
    """
    if tuple(estimate.shape) != tuple(reference.shape):
        raise ValueError(
            f"estimate: has shape {tuple(estimate.shape)} but the reference has {tuple(reference.shape)}; "
            "both must be (..., T)"
        )
    if len(estimate.shape) == 0 or estimate.shape[-1] == 0:
        raise ValueError(f"estimate: has shape {tuple(estimate.shape)}, wanted at least one sample (..., T)")
    if isinstance(estimate, np.ndarray):
        return _numpy(estimate.astype(np.float64), np.asarray(reference, dtype=np.float64))
    return _torch(estimate.double(), reference.double())


def _numpy(estimate: np.ndarray, reference: np.ndarray) -> float | np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sum(estimate * reference, -1, keepdims=True) / np.sum(reference**2, -1, keepdims=True)
        target = scale * reference
        power, distortion = np.sum(target**2, -1), np.sum((estimate - target) ** 2, -1)
        ratio_db = np.where(power > 0, 10 * np.log10(power / distortion), np.where(np.isnan(power), np.nan, -np.inf))
    if np.isnan(ratio_db).any():
        unscored("si_sdr_db", "the reference is silent")
    return float(ratio_db) if ratio_db.ndim == 0 else ratio_db


def _torch(estimate: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor":
    scale = (estimate * reference).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    target = scale * reference
    power, distortion = target.square().sum(-1), (estimate - target).square().sum(-1)
    return 10 * (power.log10() - distortion.log10()).masked_fill(power == 0, float("-inf"))
