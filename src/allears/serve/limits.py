"""What a session may use, and the pace at which it is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of each session.

    Attributes:
        frame_s: longest frame.
        message_bytes: largest message; above this it is not even read to its end.
        session_s: longest session.
        session_bytes: most bytes that a session may send.
        idle_s: longest time without a frame, and without taking what is sent.
        waiting_s: most sound that waits to be worked on; then no more is read.
        ahead_s: how far a client may run ahead of real time before it is slowed.
        gap_s: most silence that stands for frames which did not come, at each gap.
        piece_s: sound that is worked on at a time, so that sessions take turns.
    """

    frame_s: float = 0.5
    message_bytes: int = 1 << 20
    session_s: float = 3600.0
    session_bytes: int = 4 << 30
    idle_s: float = 15.0
    waiting_s: float = 1.0
    ahead_s: float = 1.0
    gap_s: float = 1.0
    piece_s: float = 0.04

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: {value} given; more than 0 is wanted")


class Pace:
    """Tells how long to wait before the next frame is read, so that nobody is much faster than real time.

    Args:
        ahead_s: that much may come at once.
    """

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s
        self._due_s: float | None = None

    def pause_s(self, now_s: float, taken_s: float) -> float:
        """Seconds to wait, at the time ``now_s``, after a frame that lasts ``taken_s``."""
        due = now_s if self._due_s is None else max(self._due_s, now_s)
        self._due_s = due + taken_s
        return max(0.0, self._due_s - now_s - self._ahead_s)
