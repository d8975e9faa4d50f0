"""Sample-rate conversion for live streams: a delay of 0.5 to 0.9 ms from or to 16 kHz, and told exactly.

An output sample is a weighted sum of the input samples that have come, a polyphase filter. Each phase is the
least-squares approximation of a delay that is shorter than half of its taps, after the complex design of low-delay
filters (Chen and Parks, IEEE TASSP 35(2), 1987). Its integrals have closed forms, so that any delay, any phase and any
two rates need one linear system.

Let n be half the lower rate. Up to 13/16 n all passes (within 0.03 dB, and with its phase within 0.3 %). To a lower
rate the response has fallen by 60 dB at n, so that nothing folds back: folded echo is not linear in its reference any
more. To a higher one it falls slowly, to 19/16 n; images of what is below 13/16 n are 58 dB down, 67 below 4/5 n.
:mod:`allears.audio.resample` passes more and is finer, but waits for 20 to 200 ms.

Shapes: C channels, n, m samples, N taps, L phases; signals are float32 (C, T).
"""

from fractions import Fraction
from functools import lru_cache
from math import ceil, gcd

import numpy as np

from allears.audio.session import Core, Session

PASS = Fraction(13, 16)
"""Up to this share of half the lower rate the response is flat."""
MOST_RATIO = 64
"""Between the two rates; what takes the most taps."""

_DELAY_DOWN, _DELAY_UP, _LENGTH = Fraction(5, 4), Fraction(3, 2), Fraction(11, 2)  # s, times the width of the fall
_MOST_PHASES = 4096  # in a sample of the lower rate; beyond, the nearest serves, at an error of -74 dB
_OUTPUTS_AT_ONCE = 2048
_WEIGHT_FALL, _WEIGHT_STOP = 1e-5, 10.0  # of squared errors, beside 1 in the pass band


def least_delay_s(from_hz: int, to_hz: int) -> Fraction:
    """The shortest delay with the response promised: 0.83 ms to 16 kHz from above, 0.5 ms from 16 kHz upwards, twice as
    much where the lower rate is 8 kHz; 0 between equal rates."""
    if from_hz == to_hz:
        return Fraction(0)
    return (_DELAY_DOWN if to_hz < from_hz else _DELAY_UP) / _fall_hz(from_hz, to_hz)


def round_trip_samples(rate_hz: int, core_rate_hz: int) -> int:
    """Samples at ``rate_hz`` by which conversion to ``core_rate_hz`` and back delays; a whole number, 0 for equal
    rates."""
    return ceil((least_delay_s(rate_hz, core_rate_hz) + least_delay_s(core_rate_hz, rate_hz)) * rate_hz)


class LowDelayResampler:
    """A stream at another rate: output sample k is the input at the time ``k / to_hz - delay_s``.

    It comes as soon as the input up to the time k / to_hz is there: after R input samples, ceil(R to_hz / from_hz)
    output samples are out. The output does not depend on the chunks. Equal rates pass it on as it is.

    Args:
        channels: C.
        from_hz, to_hz: whole numbers of Hz, at most a factor of 64 apart.
        delay_s: from :func:`least_delay_s`, the default, to twice as much.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, channels: int, from_hz: int, to_hz: int, delay_s: Fraction | None = None) -> None:
        for name, rate in (("from_hz", from_hz), ("to_hz", to_hz)):
            if int(rate) != rate or rate < 1:
                raise ValueError(f"{name}: got {rate!r}, wanted a whole number of Hz from 1 up")
        if max(from_hz, to_hz) > MOST_RATIO * min(from_hz, to_hz):
            raise ValueError(f"to_hz: got {to_hz} from {from_hz} Hz, wanted a ratio of at most {MOST_RATIO}")
        if channels < 1:
            raise ValueError(f"channels: got {channels}, wanted 1 or more")
        least = least_delay_s(from_hz, to_hz)
        self.delay_s = least if delay_s is None else Fraction(delay_s)
        if not least <= self.delay_s <= 2 * least:
            raise ValueError(f"delay_s: got {float(self.delay_s):g}, wanted {float(least):g} to {float(2 * least):g} s")
        self.channels, self.from_hz, self.to_hz = channels, int(from_hz), int(to_hz)
        self.received = 0
        self.emitted = 0
        shared = gcd(self.from_hz, self.to_hz)
        self._phases, self._step = self.to_hz // shared, self.from_hz // shared
        self._known_phases = _known_phases(self.from_hz, self.to_hz)
        self._bank = _bank(self.from_hz, self.to_hz, self.delay_s)
        self._past = np.zeros((channels, self._bank.shape[1] - 1), np.float32)
        self._next = 0  # place of the next output sample behind all input so far, in 1 / phases input samples
        self._flushed = False

    def push(self, x: np.ndarray) -> np.ndarray:
        """Chunk (C, n) float32, n >= 0, to the samples (C, m) that it completes, m >= 0.

        Raises:
            ValueError: ``x`` has another shape, or the stream has been flushed.
        """
        if self._flushed:
            raise ValueError("x: this stream has been flushed; make a new LowDelayResampler for another signal")
        if x.ndim != 2 or x.shape[0] != self.channels:
            raise ValueError(f"x: got shape {x.shape}, wanted (C, T) with C = {self.channels}")
        new = x.shape[1]
        known = np.concatenate([self._past, x], axis=1, dtype=np.float32)
        self._past = known[:, new:].copy()
        self.received += new
        behind = self._next - new * self._phases  # below 0: its input is there
        count = max(0, -(behind // self._step))
        self._next = behind + count * self._step
        self.emitted += count
        y = np.empty((self.channels, count), np.float32)
        if not count:
            return y
        windows = np.lib.stride_tricks.sliding_window_view(known, self._bank.shape[1], axis=1)
        for begin in range(0, count, _OUTPUTS_AT_ONCE):
            end = min(count, begin + _OUTPUTS_AT_ONCE)
            whole, phase = np.divmod(behind + self._step * np.arange(begin, end), self._phases)
            if self._known_phases < self._phases:
                phase = (2 * phase * self._known_phases + self._phases) // (2 * self._phases)
            np.einsum("cmk,mk->cm", windows[:, new + whole], self._bank[phase], out=y[:, begin:end])
        return y

    def flush(self) -> np.ndarray:
        """The last samples (C, m), until the delayed signal ends: ceil((T / from_hz + delay_s) to_hz) in all, none of
        no input. The stream is over then."""
        wanted = ceil((Fraction(self.received, self.from_hz) + self.delay_s) * self.to_hz) if self.received else 0
        silence = max(0, (wanted - 1) * self._step // self._phases + 1 - self.received)
        due = wanted - self.emitted
        y = self.push(np.zeros((self.channels, silence), np.float32))[:, :due]
        self._flushed = True
        return y


class AtRate:
    """A core at another rate: converted on the way in, all channels alike, and back on the way out.

    The output is in time with the input, sample for sample, as if nothing were converted: it only comes
    :attr:`delay` samples later.

    Args:
        core: takes (``channels_in``, n) and gives (``channels_out``, m), in time with it.
        rate_hz: of what goes in and comes out.
        core_rate_hz: of the core.
    """

    def __init__(self, core: Core, channels_in: int, channels_out: int, rate_hz: int, core_rate_hz: int) -> None:
        self.delay = round_trip_samples(rate_hz, core_rate_hz)
        """Samples at ``rate_hz``."""
        self._core = core
        self._there = LowDelayResampler(channels_in, rate_hz, core_rate_hz)
        rest_s = Fraction(self.delay, rate_hz) - self._there.delay_s
        self._back = LowDelayResampler(channels_out, core_rate_hz, rate_hz, rest_s)
        self._skip = self.delay  # what comes out first lies before the signal

    def push(self, x: np.ndarray) -> np.ndarray:
        return self._trim(self._back.push(self._core.push(self._there.push(x))))

    def flush(self) -> np.ndarray:
        y = np.concatenate([self._core.push(self._there.flush()), self._core.flush()], axis=1)
        return self._trim(np.concatenate([self._back.push(y), self._back.flush()], axis=1))

    def _trim(self, y: np.ndarray) -> np.ndarray:
        skipped = min(self._skip, y.shape[1])
        self._skip -= skipped
        return y[:, skipped:]


class LowDelaySession(Session):
    """A :class:`Session` for live streams: the same arguments and checks, with :class:`AtRate` around the core."""

    def __init__(self, core: Core, channels_in: int, channels_out: int, rate_hz: int, core_rate_hz: int) -> None:
        super().__init__(core, channels_in, channels_out, rate_hz, rate_hz)
        if rate_hz != core_rate_hz:
            self._core = AtRate(core, channels_in, channels_out, rate_hz, core_rate_hz)


def _stop(from_hz: int, to_hz: int) -> Fraction:
    """Where the response has fallen, as a share of half the lower rate: there, or where images of the flat part are."""
    return Fraction(1) if to_hz < from_hz else 2 - PASS


def _fall_hz(from_hz: int, to_hz: int) -> Fraction:
    return (_stop(from_hz, to_hz) - PASS) * min(from_hz, to_hz) / 2


def _known_phases(from_hz: int, to_hz: int) -> int:
    """K, at most L: so many phases have weights of their own."""
    return min(to_hz // gcd(from_hz, to_hz), ceil(Fraction(_MOST_PHASES * min(from_hz, to_hz), from_hz)))


@lru_cache(maxsize=64)
def _bank(from_hz: int, to_hz: int, delay_s: Fraction) -> np.ndarray:
    """Weights (L, N) float32 of the last N input samples, the oldest first, for an output sample 0, 1/L, 2/L ... input
    samples behind the last; where not all phases are known, (K + 1, N) for 0, 1/K ... 1."""
    if from_hz == to_hz:
        return np.ones((1, 1), np.float32)
    known = _known_phases(from_hz, to_hz)
    shares = np.arange(known + (known < to_hz // gcd(from_hz, to_hz))) / known
    lower = min(from_hz, to_hz) / from_hz * np.pi  # half of the lower rate, in radians a sample
    edge, stop = float(PASS) * lower, float(_stop(from_hz, to_hz)) * lower
    taps = np.arange(ceil(_LENGTH / _fall_hz(from_hz, to_hz) * from_hz))
    errors = (
        (1 - _WEIGHT_FALL) * _low(edge, taps)
        + (_WEIGHT_FALL - _WEIGHT_STOP) * _low(min(stop, np.pi), taps)
        + _WEIGHT_STOP * _low(np.pi, taps)
    )
    late = taps[:, None] - float(delay_s * from_hz) + shares  # of each tap behind the delay that is wanted
    wanted = (1 - _WEIGHT_FALL) * _low(edge, late) + _WEIGHT_FALL * _raised_cosine(edge, stop, late)
    bank = np.linalg.solve(errors[abs(taps[:, None] - taps)], wanted).T[:, ::-1]
    bank = np.ascontiguousarray(bank / bank.sum(1, keepdims=True), np.float32)  # a constant stays what it is
    bank.setflags(write=False)
    return bank


def _low(edge: float, t: np.ndarray) -> np.ndarray:
    """Impulse response at ``t`` samples of the low-pass up to ``edge`` radians a sample."""
    return edge / np.pi * np.sinc(edge / np.pi * t)


def _raised_cosine(edge: float, stop: float, t: np.ndarray) -> np.ndarray:
    """The same of a low-pass that falls as a raised cosine from ``edge`` to ``stop``."""
    x = (stop - edge) / np.pi * t
    smooth = np.pi / 4 * (np.sinc((x - 1) / 2) + np.sinc((x + 1) / 2))  # cos(pi x / 2) / (1 - x^2), no division by 0
    return _low((edge + stop) / 2, t) * smooth
