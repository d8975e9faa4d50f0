"""Two sound files, or one with both signals, as one stream of microphone and reference.

Shapes: M microphones, n samples.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from allears.audio.files import AudioReader
from allears.audio.formats import AudioInfo
from allears.audio.resample import StreamResampler, fit_length
from allears.core.errors import AudioFileError

log = logging.getLogger(__name__)

BLOCK_FRAMES = 65_536
SILENT = 1e-4  # a peak below -80 dB is silence for the network too
DRIFT_SHARE = 0.01
"""Lengths that differ by less than this share may come from two clocks that differ."""
_SAME_S = 0.01


class Recording:
    """Microphone and reference in blocks (M + 1, n) at the microphone's rate, the reference last; see :func:`opened`.

    Attributes:
        info: header of the microphone's file.
        mics: M.
        notes: what was found out about the two files until now.
    """

    def __init__(self, mic: AudioReader, reference: AudioReader | None, reference_channel: int | None) -> None:
        self.info: AudioInfo = mic.info
        self.mics = mic.info.channels if reference is not None else mic.info.channels - 1
        self.notes: list[str] = []
        self._mic, self._channel = mic, reference_channel
        self._played = None if reference is None else _Played(reference, mic.info.sample_rate_hz)
        self._peaks, self._compared = np.zeros(2), False

    def blocks(self) -> Iterator[np.ndarray]:
        """All of it, once."""
        return (self._both(block) for block in self._mic)

    def __iter__(self) -> Iterator[np.ndarray]:
        """All of it, once; what is to be said of it goes into ``notes`` and the log."""
        if self._played is not None:
            self._compare(self.info.duration_s, self._played.from_header_s)
        done = 0
        for both in self.blocks():
            done += both.shape[1]
            peaks = np.abs(both[:-1]).max(), np.abs(both[-1]).max()
            self._peaks = np.maximum(self._peaks, peaks)
            yield both
        if not self._compared and self._played is not None:
            known_s = self._played.heard_s if self._played.over else self._played.from_header_s
            self._compare(done / self.info.sample_rate_hz, known_s)
        for name, peak, so in zip(("microphone", "reference"), self._peaks, _WHEN_SILENT, strict=True):
            if peak < SILENT:
                self._note(f"the {name} is silent throughout (peak {peak:.1e}): {so}")

    def _both(self, block: np.ndarray) -> np.ndarray:
        if self._played is not None:
            return np.concatenate([block, self._played.take(block.shape[1])])
        assert self._channel is not None
        at = self._channel - 1
        return np.concatenate([np.delete(block, at, axis=0), block[at : at + 1]])

    def _compare(self, mic_s: float | None, reference_s: float | None) -> None:
        self._compared = mic_s is not None and reference_s is not None  # a header may not tell
        if mic_s and reference_s and (note := compare_lengths(mic_s, reference_s)):
            self._note(note)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("%s: %s", self._mic.path, text)


_WHEN_SILENT = (
    "so is the output",
    "there is no echo of it to take away; check that it is what the loudspeaker played",
)


def compare_lengths(mic_s: float, reference_s: float) -> str | None:
    """What different lengths of the two files mean, as a sentence; ``None`` for a difference of up to 10 ms."""
    apart = abs(reference_s - mic_s)
    if apart <= _SAME_S:
        return None
    share, shorter = apart / mic_s, reference_s < mic_s
    if share < DRIFT_SHARE:
        return (
            f"the reference is {apart:.2f} s {'shorter' if shorter else 'longer'} than the microphone ({share:.2%}). "
            f"If both cover the same time, their clocks drift apart by {1e6 * share:.0f} ppm, and the delay moves by "
            f"{apart:.2f} s from begin to end: some 100 ppm are followed, else bring both to one length by resampling"
        )
    if shorter:
        return (
            f"the reference ends after {reference_s:.2f} s, {apart:.2f} s before the microphone: silence stands in its "
            "place there, and no echo is taken away"
        )
    return f"the reference goes on for {apart:.2f} s after the microphone's end: that part is not used"


@contextmanager
def opened(
    mic: str | Path,
    reference: str | Path | None = None,
    reference_channel: int | None = None,
    block_frames: int = BLOCK_FRAMES,
) -> Iterator[Recording]:
    """Open both signals.

    Args:
        mic: the microphone's file, each channel a microphone.
        reference: of any rate, length and channel count: its channels are averaged, its rate becomes the microphone's,
            behind its end it is silent, and what is longer than the microphone is not read.
        reference_channel: for ``reference=None``: the channel of ``mic`` that holds the reference, from 1; the others
            are microphones. ``None``: ``mic`` has two channels, and the second is it.
        block_frames: n.

    Raises:
        AudioFileError: a file cannot be read, or ``mic`` has no such channel, or none beside it.
        ValueError: both ``reference`` and ``reference_channel``, or a reference that is the microphone's file.
    """
    if reference is not None and reference_channel is not None:
        raise ValueError(f"reference_channel: {reference_channel} given beside the reference {reference}; choose one")
    if reference is not None and os.path.exists(reference) and os.path.exists(mic) and os.path.samefile(mic, reference):
        raise ValueError(f"reference: {reference} is the microphone's file too; give what the loudspeaker played")
    with AudioReader(mic, block_frames) as reader:
        if reference is not None:
            with AudioReader(reference, block_frames) as played:
                yield Recording(reader, played, None)
            return
        channels = reader.info.channels
        if reference_channel is None and channels != 2:
            raise AudioFileError(
                f"{mic}: has {channels} channel{'s' * (channels != 1)}; give a reference too, or a stereo file with "
                "the microphone left and the reference right, or tell which channel the reference is"
            )
        channel = 2 if reference_channel is None else reference_channel
        if channels < 2 or not 1 <= channel <= channels:
            raise AudioFileError(
                f"{mic}: has {channels} channel{'s' * (channels != 1)}, but the reference is wanted in channel "
                f"{channel}, and a microphone beside it; channels count from 1"
            )
        yield Recording(reader, None, channel)


class _Played:
    """The reference's file as one channel at the microphone's rate, silent behind its end."""

    def __init__(self, reader: AudioReader, rate_hz: int) -> None:
        self._blocks: Iterator[np.ndarray] = iter(reader)
        self._resampler = StreamResampler(1, reader.info.sample_rate_hz, rate_hz)
        self._waiting = np.zeros((1, 0), np.float32)
        self.from_header_s = reader.info.duration_s
        self.over = False

    @property
    def heard_s(self) -> float:
        """Seconds that were read."""
        return self._resampler.received / self._resampler.from_hz

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` samples, (1, count)."""
        while self._waiting.shape[1] < count and not self.over:
            block = next(self._blocks, None)
            self.over = block is None
            new = self._resampler.flush() if block is None else self._resampler.push(block.mean(0, keepdims=True))
            self._waiting = np.concatenate([self._waiting, new], axis=1)
        taken, self._waiting = self._waiting[:, :count], self._waiting[:, count:]
        return fit_length(taken, count)
