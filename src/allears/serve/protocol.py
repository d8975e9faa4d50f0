"""The frames that go over a WebSocket, and the codes that it is closed with; README.md tells the same for clients.

All numbers are little-endian. n samples of the microphone, k of the reference.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

VERSION = 1
AUDIO, END = 1, 2
FLOAT32, INT16 = 0, 1
NOTHING_PLAYED = 1
"""A flag: no reference comes, and none is to be waited for."""

REQUEST = struct.Struct("<BBBBIII")
"""version, kind, format, flags, sequence, n, k; behind it n and k samples."""

REPLY = struct.Struct("<BBBBIIfff")
"""version, kind, format, 0, sequence, n, delay_ms, voice, took_ms; behind it n samples."""

LOUDEST = 8.0
"""Full scale is 1; samples beyond this are cut to it."""

_SEQUENCES = 2**32
_DTYPES = {FLOAT32: np.dtype("<f4"), INT16: np.dtype("<i2")}
_FORMATS = {"float32": FLOAT32, "int16": INT16}


class Code(IntEnum):
    """Why a connection was closed."""

    DONE = 1000
    STOPPING = 1001
    NOT_BINARY = 1003
    ORIGIN = 1008
    TOO_LARGE = 1009
    FAULT = 1011
    FULL = 1013
    BAD_REQUEST = 4000
    BAD_FRAME = 4001
    IDLE = 4002
    TIME_OVER = 4003
    BYTES_OVER = 4004
    NOT_LIVE = 4005
    NOT_READING = 4006


class Refusal(Exception):
    """A session that cannot go on, or cannot begin: a code and a sentence for the client."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    @property
    def reason(self) -> str:
        """The message as far as a closing frame holds it: 123 bytes."""
        return self.message.encode()[:123].decode(errors="ignore")


@dataclass(frozen=True, eq=False)
class Frame:
    """What a client sent: float32 samples, finite and at most :data:`LOUDEST`. ``repaired``: they were not before."""

    kind: int
    format: int
    sequence: int
    mic: np.ndarray
    reference: np.ndarray
    repaired: bool


@dataclass(frozen=True, eq=False)
class Reply:
    """What the server sends: ``near`` (n,); delay and voice of the newest 10 ms, NaN where they are not known;
    ``took_ms`` from a frame's arrival to this reply."""

    kind: int
    format: int
    sequence: int
    near: np.ndarray
    delay_ms: float
    voice: float
    took_ms: float


def decode(data: bytes, most_samples: int) -> Frame:
    """A client's message.

    Args:
        data: as it came.
        most_samples: of either signal in a frame.

    Raises:
        Refusal: it is no frame, or too long a one.
    """
    if len(data) < REQUEST.size:
        raise Refusal(Code.BAD_FRAME, f"frame of {len(data)} bytes; a header alone has {REQUEST.size}")
    version, kind, kind_of_sample, flags, sequence, n, k = REQUEST.unpack_from(data)
    if version != VERSION or kind not in (AUDIO, END) or kind_of_sample not in _DTYPES or flags & ~NOTHING_PLAYED:
        raise Refusal(
            Code.BAD_FRAME,
            f"header: version {version}, kind {kind}, format {kind_of_sample}, flags {flags}; see the protocol",
        )
    if max(n, k) > most_samples:
        raise Refusal(Code.TOO_LARGE, f"frame of {max(n, k)} samples; at most {most_samples}: send shorter ones")
    dtype = _DTYPES[kind_of_sample]
    wanted = REQUEST.size + (n + k) * dtype.itemsize
    if len(data) != wanted:
        raise Refusal(Code.BAD_FRAME, f"frame of {len(data)} bytes; its header tells of {n} + {k} samples: {wanted}")
    if flags & NOTHING_PLAYED and k:
        raise Refusal(Code.BAD_FRAME, f"header: nothing is played, but {k} samples of reference came")
    samples = np.frombuffer(data, dtype, offset=REQUEST.size)
    repaired = False
    if kind_of_sample == INT16:
        samples = samples.astype(np.float32) / 32768.0
    elif samples.size and not float(np.abs(samples).max()) <= LOUDEST:  # true of NaN, too
        samples, repaired = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0).clip(-LOUDEST, LOUDEST), True
    mic, reference = samples[:n], samples[n:]
    if flags & NOTHING_PLAYED:
        reference = np.zeros(n, np.float32)
    return Frame(kind, kind_of_sample, sequence, mic, reference, repaired)


def encode(
    sequence: int,
    mic: np.ndarray,
    reference: np.ndarray | None,
    kind: int = AUDIO,
    sample_format: str = "float32",
) -> bytes:
    """A client's frame: (n,) and (k,) samples; without a reference nothing is played."""
    number = _FORMATS[sample_format]
    played = np.zeros(0, np.float32) if reference is None else reference
    head = REQUEST.pack(
        VERSION,
        kind,
        number,
        NOTHING_PLAYED if reference is None else 0,
        sequence % _SEQUENCES,
        len(mic),
        len(played),
    )
    return head + _packed(mic, number) + _packed(played, number)


def encode_reply(reply: Reply) -> bytes:
    """A server's frame."""
    head = REPLY.pack(
        VERSION,
        reply.kind,
        reply.format,
        0,
        reply.sequence,
        len(reply.near),
        reply.delay_ms,
        reply.voice,
        reply.took_ms,
    )
    return head + _packed(reply.near, reply.format)


def decode_reply(data: bytes) -> Reply:
    """A server's message, for clients in Python."""
    _, kind, number, _, sequence, n, delay_ms, voice, took_ms = REPLY.unpack_from(data)
    near = np.frombuffer(data, _DTYPES[number], offset=REPLY.size)
    if len(near) != n:
        raise ValueError(f"data: {len(near)} samples came, the header tells of {n}")
    scaled = near.astype(np.float32) / 32768.0 if number == INT16 else near
    return Reply(kind, number, sequence, scaled, delay_ms, voice, took_ms)


def behind(sequence: int, expected: int) -> int:
    """How many frames are missing before ``sequence``; negative where it has been here, or is late."""
    apart = (sequence - expected) % _SEQUENCES
    return apart if apart < _SEQUENCES // 2 else apart - _SEQUENCES


def _packed(samples: np.ndarray, number: int) -> bytes:
    if number == INT16:
        samples = np.rint(np.clip(samples, -1.0, 32767 / 32768) * 32768.0)
    return np.ascontiguousarray(samples, _DTYPES[number]).tobytes()
