"""One stream: frames in, in whatever order and state they come, pieces of work out, and replies.

n samples of the microphone, k of the reference.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from allears.models.echo.stream import EchoSession, Facts, Network
from allears.serve.limits import Limits
from allears.serve.protocol import FLOAT32, Code, Frame, Refusal, behind

_NONE = np.zeros(0, np.float32)


class Piece(NamedTuple):
    """Sound to work on at once, (n,) and (k,); ``last``: then the session is over."""

    mic: np.ndarray
    reference: np.ndarray
    last: bool


class Result(NamedTuple):
    """(m,) samples of the near end, and delay and voice of the newest 10 ms, NaN where they are not known."""

    near: np.ndarray
    delay_ms: float
    voice: float


class LiveSession:
    """An echo canceller behind a client that may drop, repeat and damage its frames.

    - A frame whose place is taken (one that came already, or late) is left out.
    - Where frames are missing, silence of both signals stands for them, as long as the frame before, so that the two
      stay in time with each other and with the client; at most ``gap_s`` of it.
    - Samples that are no numbers, or absurd, have been repaired.

    ``counts`` tells how often each of these happened: ``late``, ``duplicated``, ``dropped``, ``repaired``.

    Args:
        net: a network, or an engine that many sessions share.
        sample_rate_hz: of the client.
        limits: of the session.

    Raises:
        ValueError: a rate that is none of a sound recording.
    """

    def __init__(self, net: Network, sample_rate_hz: int, limits: Limits) -> None:
        self._stream = EchoSession(net, 1, sample_rate_hz)
        self._rate, self._limits = sample_rate_hz, limits
        self._piece = max(1, round(limits.piece_s * sample_rate_hz))
        self._mic: list[np.ndarray] = []
        self._reference: list[np.ndarray] = []
        self._expected: int | None = None
        self._before = (0, 0)
        self._ended = False
        self.counts: Counter[str] = Counter()
        self.waiting = 0
        """Samples of the longer signal that wait for :meth:`next_piece`."""

        self.format = FLOAT32
        """Of the newest frame with samples of the microphone: replies have it too."""
        self.received = 0
        """Samples of the microphone that were taken, silence for missing frames included."""

    @property
    def latency_ms(self) -> float:
        """From a sample's arrival to its coming out, the processor's time left out."""
        return self._stream.latency_ms

    @property
    def waiting_s(self) -> float:
        return self.waiting / self._rate

    def accept(self, frame: Frame) -> bool:
        """Take a frame, or leave it out; whether it was taken."""
        apart = 0 if self._expected is None else behind(frame.sequence, self._expected)
        if apart < 0:
            self.counts["duplicated" if apart == -1 else "late"] += 1
            return False
        if apart:
            self.counts["dropped"] += apart
            self._fill(apart)
        self.counts["repaired"] += frame.repaired
        self._expected = frame.sequence + 1
        if frame.mic.size:
            self.format = frame.format
        self._before = (len(frame.mic), len(frame.reference))
        self._add(frame.mic, frame.reference)
        return True

    def end(self) -> None:
        """No more comes: what waits is worked on, and the rest given."""
        self._ended = True

    def next_piece(self) -> Piece | None:
        """Sound to work on, or ``None`` where none waits."""
        if not self.waiting and not self._ended:
            return None
        mic, self._mic = _take(self._mic, self._piece)
        reference, self._reference = _take(self._reference, self._piece)
        self._count()
        return Piece(mic, reference, self._ended and not self.waiting)

    def work(self, piece: Piece) -> Result:
        """Cancel the echo in a piece; in any thread, but a piece after another.

        Raises:
            Refusal: the reference is too far ahead of the microphone, or the network gave something that is no number.
        """
        try:
            near = self._stream.push(piece.mic, piece.reference)
        except ValueError as error:
            raise Refusal(Code.BAD_FRAME, str(error)) from error
        if piece.last:
            near = np.concatenate([near, self._stream.flush()])
        if not np.isfinite(near).all():
            raise Refusal(Code.FAULT, "the network gave samples that are no numbers: begin a new session")
        facts = self._stream.facts or Facts(None, None, None)
        return Result(near, _newest(facts.delay_ms), _newest(facts.voice))

    def _fill(self, frames: int) -> None:
        most = self._limits.gap_s * self._rate
        longer = max(1, *self._before)
        frames = min(frames, int(most // longer))
        mic, reference = self._before
        self._add(np.zeros(frames * mic, np.float32), np.zeros(frames * reference, np.float32))

    def _add(self, mic: np.ndarray, reference: np.ndarray) -> None:
        self._mic.append(mic)
        self._reference.append(reference)
        self.received += len(mic)
        self._count()

    def _count(self) -> None:
        self.waiting = max(sum(map(len, self._mic)), sum(map(len, self._reference)))


def _take(parts: list[np.ndarray], most: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The first ``most`` samples of all, and what is left."""
    whole = parts[0] if len(parts) == 1 else np.concatenate([_NONE, *parts])
    return whole[:most], [whole[most:]] if len(whole) > most else []


def _newest(values: np.ndarray | None) -> float:
    return float("nan") if values is None or not values.size else float(values[0, -1])
