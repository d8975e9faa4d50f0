"""How much echo is gone, how soon, and whether the near end was left alone.

No one of these says how good a canceller is: an output of zeros has the highest echo return loss enhancement.
"""

from typing import Any

import numpy as np

from .inputs import mono, mono_pair
from .reasons import unscored

HOP_S = 0.01


def erle_db(mic: Any, output: Any, mask: Any = None) -> float:
    """Echo return loss enhancement: 10 log10 of the microphone's energy over the output's (ITU-T G.168).

    Args:
        mic, output: (T,) float, aligned.
        mask: (T,) bool: samples in which the far end alone is heard; all by default.

    Returns:
        dB; inf for an output of zeros, NaN where the microphone has no energy.

    Raises:
        ValueError: the lengths differ, or a signal is not finite.
    """
    mic, output = _pair(mic, output)
    chosen = np.ones(len(mic), bool) if mask is None else np.asarray(mask)
    if chosen.shape != mic.shape or chosen.dtype != bool:
        raise ValueError(
            f"mask: got {chosen.dtype} of shape {chosen.shape}, wanted bool of shape {mic.shape}, one a sample"
        )
    before, after = np.sum(mic[chosen] ** 2), np.sum(output[chosen] ** 2)
    if before == 0:
        return unscored("erle_db", "the microphone is silent where echo is looked for")
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(before / after))


def time_to_erle_s(
    mic: Any,
    output: Any,
    sample_rate_hz: int,
    level_db: float = 20.0,
    start_s: float = 0.0,
    window_s: float = 0.2,
    active_db: float = -40.0,
    hold_s: float = 0.0,
) -> float:
    """How long after the echo began the canceller takes it down by ``level_db``.

    Energies are taken over ``window_s``, every 10 ms. The echo begins with the first window from ``start_s`` on whose
    microphone energy is within ``active_db`` of the loudest; the time is that of the start of the first such window
    whose echo return loss enhancement is ``level_db`` or more.

    Args:
        mic, output: (T,) float, aligned, far end alone.
        start_s: where to begin, such as at a change of the path.
        hold_s: for how long all windows with echo from there on must be so too: an echo that was not heard for a moment
            is not yet one that is gone.

    Returns:
        Seconds; inf where the level is never reached, NaN where there is no echo.

    Raises:
        ValueError: the lengths differ, a signal is not finite, or the clip is shorter than a window.
    """
    mic, output = _pair(mic, output)
    hop, first = round(HOP_S * sample_rate_hz), round(start_s * sample_rate_hz)
    count = max(1, round(window_s / HOP_S))
    before, after = (_window_energies(x[first:], hop, count) for x in (mic, output))
    if not len(before):
        raise ValueError(
            f"mic: {len(mic) / sample_rate_hz:.2f} s given; wanted {window_s} s or more from start_s = {start_s} on"
        )
    active = before >= before.max() * 10 ** (active_db / 10)
    if before.max() <= 0:
        return unscored("time_to_erle_s", "the microphone is silent")
    gone = before >= after * 10 ** (level_db / 10)
    failed = np.concatenate([[0], np.cumsum(active & ~gone)])
    until = np.minimum(np.arange(len(gone)) + round(hold_s / HOP_S) + 1, len(gone))
    reached = active & gone & (failed[until] == failed[:-1])
    if not reached.any():
        return float("inf")
    return float((reached.argmax() - active.argmax()) * HOP_S)


def recovery_s(mic: Any, output: Any, sample_rate_hz: int, changed_s: float, level_db: float = 20.0) -> float:
    """How long after a change of delay or path the echo is down again as far as it was.

    As far: by ``level_db``, or, where it was not so far down in the 2 s before the change, 3 dB less than there; for
    half a second on end.

    Args:
        mic, output: (T,) float, aligned, far end alone.
        changed_s: when the change came.

    Returns:
        Seconds; inf where that is never reached, NaN where nothing was taken away before (less than 6 dB), or there is
        no echo.

    Raises:
        ValueError: as :func:`time_to_erle_s`, or nothing lies before the change.
    """
    mic, output = _pair(mic, output)
    changed = round(changed_s * sample_rate_hz)
    before = slice(max(0, changed - 2 * sample_rate_hz), changed)
    if changed <= 0:
        raise ValueError(f"changed_s: got {changed_s}, wanted a time above 0, that of the change")
    reached_db = erle_db(mic[before], output[before])
    if not reached_db >= 6.0:
        return unscored("recovery_s", f"{reached_db:.1f} dB were taken away before the change; wanted 6 or more")
    wanted_db = min(level_db, reached_db - 3.0)
    return time_to_erle_s(mic, output, sample_rate_hz, wanted_db, changed_s, hold_s=0.5)


def aligned_share(found: Any, delays: Any, active: Any, tolerance: int = 1) -> float:
    """The share of frames whose delay was found to within ``tolerance`` frames.

    Args:
        found, delays: (T,) frames of delay, as found and as it is.
        active: (T,) bool: the frames that count, in which the far end is heard.

    Returns:
        0 to 1; NaN where no frame counts.

    Raises:
        ValueError: the shapes differ.
    """
    found, delays, active = np.asarray(found), np.asarray(delays), np.asarray(active, bool)
    if not found.shape == delays.shape == active.shape:
        raise ValueError(f"found, delays, active: got {found.shape}, {delays.shape}, {active.shape}, wanted one shape")
    if not active.any():
        return unscored("aligned_share", "the far end is never heard")
    return float((np.abs(found - delays)[active] <= tolerance).mean())


def sdr_filtered_db(estimate: Any, reference: Any, taps: int = 512) -> float:
    """Signal-to-distortion ratio that forgives one fixed filter: what of the estimate is the reference through the best
    filter of ``taps`` taps, over the rest. Vincent, Gribonval, Fevotte, "Performance measurement in blind audio source
    separation", IEEE TASLP 14(4), 2006, section III-B, for one source.

    Args:
        estimate, reference: (T,) float, aligned: the filter has no taps before time 0.

    Returns:
        dB; above 100 for an estimate that is a filtered reference, -inf for a silent one, NaN where the reference is
        silent.

    Raises:
        ValueError: the lengths differ, a signal is not finite, or there are no taps.
    """
    if taps < 1:
        raise ValueError(f"taps: got {taps}, wanted 1 or more")
    estimate, reference = mono_pair(estimate, reference)
    if not np.any(reference):
        return unscored("sdr_filtered_db", "the reference is silent")
    length = len(reference) + taps - 1
    size = 1 << (length - 1).bit_length()
    spectrum, other = np.fft.rfft(reference, size), np.fft.rfft(estimate, size)
    own = np.fft.irfft(np.abs(spectrum) ** 2, size)[:taps]
    cross = np.fft.irfft(other * np.conj(spectrum), size)[:taps]
    lags = np.abs(np.arange(taps)[:, None] - np.arange(taps))
    matrix = own[lags] + 1e-10 * own[0] * np.eye(taps)  # a band that is empty has no filter of its own
    best = np.linalg.solve(matrix, cross)
    target = np.fft.irfft(spectrum * np.fft.rfft(best, size), size)[:length]
    distortion = np.sum((np.pad(estimate, (0, taps - 1)) - target) ** 2)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.sum(target**2) / distortion)) if np.any(target) else float("-inf")


def _pair(mic: Any, output: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as (T,) float64."""
    mic, output = mono("mic", mic), mono("output", output)
    if len(mic) != len(output):
        raise ValueError(
            f"output: has {len(output)} samples but the microphone has {len(mic)}; align and trim them first"
        )
    return mic, output


def _window_energies(x: np.ndarray, hop: int, count: int) -> np.ndarray:
    """Energies of all windows of ``count`` hops of x (T,), one a hop."""
    blocks = np.sum(x[: len(x) // hop * hop].reshape(-1, hop) ** 2, axis=1)
    total = np.concatenate([[0.0], np.cumsum(blocks)])
    return np.maximum(total[count:] - total[:-count], 0.0) if len(blocks) >= count else np.zeros(0)
