"""The network on endless signals: hops of any number at once, and a session that takes both signals as they arrive.

Shapes: M microphones, R references (1 for all, or one for each microphone), n samples, T frames, D delays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from allears.audio.low_delay import LowDelaySession, round_trip_samples
from allears.models.echo.config import EchoConfig
from allears.models.echo.model import Heard
from allears.models.echo.own_rate import OwnRate, whole_hop

_HOPS_AT_ONCE = {"cpu": 100, "cuda": 1000}
_LOUDEST = 1e15  # as of the session: refused here, before anything has changed


class Network(Protocol):
    """What a stream runs between its transforms: an ``EchoNet`` at rest, or its ONNX file (``runtime.OnnxNet``)."""

    config: EchoConfig

    def initial_state(self, batch: int) -> Any: ...

    def cancel(self, spectra: Tensor, state: Any) -> tuple[Tensor, Heard, Any]: ...


@dataclass(frozen=True, eq=False)
class Facts:
    """What was found in T frames of 10 ms; each (M, T), or ``None`` where the network does not tell it.

    Attributes:
        delay_ms: by which the echo lags behind the reference, as it was found.
        confidence: share of the attention within one frame of that delay.
        voice: probability that somebody speaks at the near end.
        alignment: (M, T, D), the attention over delays of 0 to D - 1 frames, of which the first two are told.
    """

    delay_ms: np.ndarray | None
    confidence: np.ndarray | None
    voice: np.ndarray | None
    alignment: np.ndarray | None = None


OnFacts = Callable[[Facts], None]


def facts_of(heard: Heard, config: EchoConfig) -> Facts:
    """Facts of the frames (M, T) of which the network tells ``heard``."""
    delay_ms, confidence, voice, alignment = None, None, None, None
    if heard.alignment is not None:
        weights = heard.alignment.float()
        best = weights.argmax(-1, keepdim=True)
        near = torch.nn.functional.pad(weights, (1, 1)).unfold(-1, 3, 1).sum(-1)
        confidence = near.gather(-1, best)[..., 0].cpu().numpy()
        delay_ms = (1000 * config.hop_s * best[..., 0]).float().cpu().numpy()
        alignment = weights.cpu().numpy()
    if heard.voice is not None:
        voice = heard.voice.float().sigmoid().cpu().numpy()
    return Facts(delay_ms, confidence, voice, alignment)


class EchoCore:
    """Samples of M microphones and R references in, as many near-end samples out, a window later.

    Args:
        net: at rest (``eval``).
        mics: M.
        references: R, 1 or M.
        on_facts: is told what is found, as it is found; the last frame lies behind the end of the signal.
        rate_hz: of all signals, the network's by default; a hop must be a whole number of samples (``whole_hop``).

    Raises:
        ValueError: a rate of which a hop is no whole number of samples.
    """

    def __init__(
        self,
        net: Network,
        mics: int,
        references: int = 1,
        on_facts: OnFacts | None = None,
        rate_hz: int | None = None,
    ) -> None:
        self._net, self._mics, self._on_facts = net, mics, on_facts
        hop = net.config.hop if rate_hz is None else whole_hop(rate_hz, net.config)
        if hop is None:
            raise ValueError(
                f"rate_hz: {rate_hz} given; one from 4000 to 384000 of which {1000 * net.config.hop_s:g} ms are whole "
                f"samples is wanted: convert to {net.config.sample_rate_hz} Hz"
            )
        self._hop = hop
        self._device = next(net.parameters()).device if isinstance(net, nn.Module) else torch.device("cpu")
        self._own_rate = OwnRate(net.config.bins, hop, mics, self._device)
        with torch.inference_mode():
            self._state = net.initial_state(mics)
        self._pending = np.zeros((mics + references, 0), np.float32)
        self._owed = 0  # samples that went in and are not out
        self._skip = hop  # the first hop that comes out lies before the signal

    def push(self, x: np.ndarray) -> np.ndarray:
        """x (M + R, n), microphones first, to (M, m)."""
        self._owed += x.shape[1]
        pending = np.concatenate([self._pending, x], axis=1) if self._pending.shape[1] else x
        whole = pending.shape[1] // self._hop * self._hop
        self._pending = pending[:, whole:].copy()
        return self._run(pending[:, :whole])

    def flush(self) -> np.ndarray:
        """The rest; all together are as many samples as went in."""
        if not self._owed:
            return np.zeros((self._mics, 0), np.float32)
        rest = self._pending.shape[1]
        self._pending = np.pad(self._pending, ((0, 0), (0, self._hop + (-rest) % self._hop)))
        return self._run(self._pending)

    def _run(self, x: np.ndarray) -> np.ndarray:
        step = _HOPS_AT_ONCE.get(self._device.type, 100) * self._hop
        parts = [self._advance(x[:, begin : begin + step]) for begin in range(0, x.shape[1], step)]
        y = np.concatenate(parts, axis=1) if parts else np.zeros((self._mics, 0), np.float32)
        skipped = min(self._skip, y.shape[1])
        self._skip -= skipped
        y = y[:, skipped : skipped + self._owed]
        self._owed -= y.shape[1]
        return y

    @torch.inference_mode()
    def _advance(self, x: np.ndarray) -> np.ndarray:
        both = torch.from_numpy(np.ascontiguousarray(x)).to(self._device)
        mic, reference = both[: self._mics], both[self._mics :].expand(self._mics, -1)
        spectrum, heard, self._state = self._net.cancel(self._own_rate.analyse(mic, reference), self._state)
        if self._on_facts is not None:
            self._on_facts(facts_of(heard, self._net.config))
        return self._own_rate.synthesise(spectrum).cpu().numpy()


def resampling_ms(rate_hz: int, config: EchoConfig) -> float:
    """What conversion of the rate adds to the delay of a live stream: nothing where a hop is a whole number of samples
    (every multiple of 100 Hz, with hops of 10 ms), for the network works on the stream's own spectra there."""
    if whole_hop(rate_hz, config) is not None:
        return 0.0
    return 1000.0 * round_trip_samples(rate_hz, config.sample_rate_hz) / rate_hz


class EchoSession:
    """A live canceller: chunks of any size in, also of two sizes, and what is done of the near end out.

    Both signals are put together in the order of their samples: sample k of the microphone with sample k of the
    reference. Where one is ahead, it waits for the other. Three things let a stream go on:

    - ``push(mic, None)``: nothing is played now; the reference is silent for as long as the chunk lasts.
    - The microphone waits at most ``patience_s`` for the reference. Then all that waits is done with a silent
      reference, and so is what comes until the reference does, without another wait. When the reference comes again,
      what it is ahead of the microphone by is taken as the late part of it, and dropped, up to what was replaced;
      after that the two run together again.
    - A reference that is more than 10 s ahead is refused.

    A chunk that is refused changes nothing. The output is in time with the microphone at every rate. At multiples of
    100 Hz (hops of 10 ms are whole samples) nothing is converted: the network hears the spectra of both signals, as
    far as it knows them. Other rates, as 11,025 and 22,050 Hz, are converted with little delay, both signals alike.

    Args:
        net: at rest (``eval``).
        channels: M; the reference has one channel.
        sample_rate_hz: of both signals, 4,000 to 384,000.
        patience_s: as above.
        on_facts: is told what is found, as it is found.

    Raises:
        ValueError: a rate, a number of channels or a patience out of its range.
    """

    MOST_AHEAD_S = 10.0

    def __init__(
        self,
        net: Network,
        channels: int,
        sample_rate_hz: int,
        patience_s: float = 0.2,
        on_facts: OnFacts | None = None,
    ) -> None:
        if channels < 1:
            raise ValueError(f"channels: {channels} given; at least one microphone is wanted")
        if not 0 <= patience_s < self.MOST_AHEAD_S:
            raise ValueError(f"patience_s: {patience_s} given; 0 to below {self.MOST_AHEAD_S:g} s is wanted")
        self._channels, self._rate, self._config = channels, sample_rate_hz, net.config
        self._on_facts = on_facts
        core_rate_hz = net.config.sample_rate_hz if whole_hop(sample_rate_hz, net.config) is None else sample_rate_hz
        core = EchoCore(net, channels, 1, self._listen, core_rate_hz)
        self._session = LowDelaySession(core, channels + 1, channels, sample_rate_hz, core_rate_hz)
        self._patience = round(patience_s * sample_rate_hz)
        self._most_ahead = round(self.MOST_AHEAD_S * sample_rate_hz)
        self._mic = np.zeros((channels, 0), np.float32)
        self._reference = np.zeros((1, 0), np.float32)
        self._replaced = 0  # reference samples that silence stands for, since the reference was last heard
        self._over, self._flat = False, channels == 1
        self.facts: Facts | None = None
        """Of the frames that were found last."""

    @property
    def latency_ms(self) -> float:
        """From a sample's arrival to its coming out, with chunks of one hop (10 ms) or of single samples, conversion of
        the rate included where there is one; the time that the processor takes is not in it."""
        return self._config.latency_ms + resampling_ms(self._rate, self._config)

    @property
    def waiting_s(self) -> tuple[float, float]:
        """How much of the microphone and of the reference waits for the other."""
        return self._mic.shape[1] / self._rate, self._reference.shape[1] / self._rate

    def push(self, mic: np.ndarray | Tensor, reference: np.ndarray | Tensor | None) -> np.ndarray:
        """Chunks of both, n and k samples, also none, to what is done: float32, as many channels as ``mic``.

        Args:
            mic: (n,) or (M, n), floating.
            reference: (k,) or (1, k), floating; ``None`` for silence of n samples.

        Raises:
            ValueError: another type or shape, samples that are not finite, a reference that is too far ahead, or a
                session that has been flushed.
        """
        if self._over:
            raise ValueError("push: this session has been flushed; make a new one with stream()")
        x = _chunk(mic, self._channels, "mic")
        r = np.zeros((1, x.shape[1]), np.float32) if reference is None else _chunk(reference, 1, "reference")
        ahead = self._reference.shape[1] + r.shape[1] - self._mic.shape[1] - x.shape[1] - self._replaced
        if ahead > self._most_ahead:
            raise ValueError(
                f"reference: {ahead / self._rate:.1f} s ahead of the microphone; at most {self.MOST_AHEAD_S:g} s wait. "
                "Push what the microphone heard meanwhile"
            )
        self._mic = np.concatenate([self._mic, x], axis=1)
        self._reference = np.concatenate([self._reference, r], axis=1)
        if x.shape[1] and self._replaced and self._reference.shape[1]:
            late = min(self._replaced, max(0, self._reference.shape[1] - self._mic.shape[1]))
            self._reference, self._replaced = self._reference[:, late:], 0
        missing = self._mic.shape[1] - self._reference.shape[1]
        if missing > (0 if self._replaced else self._patience):  # what is missing longer is not waited for again
            self._reference = np.pad(self._reference, ((0, 0), (0, missing)))
            self._replaced += missing
        self._flat = mic.ndim == 1
        y = self._done(min(self._mic.shape[1], self._reference.shape[1]))
        return y[0] if self._flat else y

    def flush(self) -> np.ndarray:
        """The rest of the near end, (n,) if the last chunk was, else (M, n); a reference that is missing is silent.

        All together are as many samples as the microphone gave. The session is over then.
        """
        if self._over:
            raise ValueError("flush: this session has been flushed; make a new one with stream()")
        self._over = True
        count = self._mic.shape[1]
        self._reference = np.pad(self._reference, ((0, 0), (0, max(0, count - self._reference.shape[1]))))
        y = np.concatenate([self._done(count), self._session.flush()], axis=1)
        return y[0] if self._flat else y

    def _done(self, count: int) -> np.ndarray:
        both = np.concatenate([self._mic[:, :count], self._reference[:, :count]])
        self._mic, self._reference = self._mic[:, count:].copy(), self._reference[:, count:].copy()
        return self._session.push(both)

    def _listen(self, facts: Facts) -> None:
        self.facts = facts
        if self._on_facts is not None:
            self._on_facts(facts)


def _chunk(x: np.ndarray | Tensor, channels: int, name: str) -> np.ndarray:
    """A chunk (n,) or (C, n), n at least 0, as (C, n) float32."""
    wanted = f"(n,) or ({channels}, n)" if channels == 1 else f"({channels}, n)"
    if not isinstance(x, np.ndarray | Tensor):
        raise ValueError(f"{name}: {type(x).__name__} given; an array or a tensor {wanted} is wanted")
    floating = x.is_floating_point() if isinstance(x, Tensor) else np.issubdtype(x.dtype, np.floating)
    if not floating:
        raise ValueError(f"{name}: dtype {x.dtype} given; floating samples are wanted (int16: divide by 32768)")
    if not (x.ndim == 2 and x.shape[0] == channels) and not (x.ndim == 1 and channels == 1):
        raise ValueError(f"{name}: shape {tuple(x.shape)} given; {wanted} is wanted")
    y = x.detach().cpu().float().numpy() if isinstance(x, Tensor) else x.astype(np.float32, copy=False)
    if not np.isfinite(y).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(y))} samples are NaN or infinite; drop the chunk")
    if (peak := float(np.abs(y).max(initial=0.0))) > _LOUDEST:
        raise ValueError(f"{name}: a sample of size {peak:.1e}; full scale is 1, and {_LOUDEST:.0e} the most taken")
    return y.reshape(channels, -1)
