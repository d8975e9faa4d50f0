"""Echo cancellers of others: Speex, and AEC3 of WebRTC. Each clip begins with a fresh state; samples are 16 bit.

Speex: Valin, "On adjusting the learning rate in frequency domain echo cancellation with double-talk", IEEE TASLP 15(3),
2007. Its library is called by itself: package ``speexdsp-aec`` calls the same functions, without the suppressor.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes.util import find_library

import numpy as np

from benchmarks.clips import RATE_HZ
from benchmarks.echo_clips import HOP, Cancelled, EchoClip
from benchmarks.registry import NotInstalledError, system

from .echo import Cancel, stacked

SPEEX_FRAME, SPEEX_TAIL = 320, 6_400
"""20 ms, as its manual has it, and 400 ms."""
AEC3_DELAY = 128
"""Samples that the output comes late, measured by cross-correlation on clean speech."""
_RATE, _ECHO_STATE = 24, 24
"""Requests: the echo canceller's to set its rate, and the preprocessor's to take the echo canceller's estimate. Its
suppressor does nothing unless the denoiser is on, as it is by default."""


@system("echo", about="libspeexdsp: echo canceller of 400 ms, suppressor of what is left, and denoiser")
def speex() -> Cancel:
    library = load_speex()
    return lambda clips: [through_speex(library, clip.truth.mic, clip.truth.reference, True) for clip in clips]


@system("echo", about="as speex, without suppressor and denoiser: the same as package speexdsp-aec")
def speex_linear() -> Cancel:
    library = load_speex()
    return lambda clips: [through_speex(library, clip.truth.mic, clip.truth.reference, False) for clip in clips]


@system("echo", about="as speex; the reference comes with the true delay")
def speex_oracle() -> Cancel:
    library = load_speex()

    def cancel(clips: Sequence[EchoClip]) -> list[Cancelled]:
        import torch

        from allears.audio.kalman import aligned

        delays = torch.from_numpy(np.stack([clip.truth.delay_frames for clip in clips]))
        told = aligned(stacked(clips)[1], HOP * delays).numpy()
        pairs = zip(clips, told, strict=True)
        return [through_speex(library, clip.truth.mic, reference, True) for clip, reference in pairs]

    return cancel


@system(
    "echo",
    needs=("aec-audio-processing",),
    about="AEC3 of WebRTC without noise suppressor and gain control, not told the delay; 8 ms late (taken off)",
)
def webrtc_aec3() -> Cancel:
    from aec_audio_processing import AudioProcessor

    def cancel_one(clip: EchoClip) -> Cancelled:
        processor = AudioProcessor(enable_aec=True, enable_ns=False, enable_agc=False, enable_vad=False)
        processor.set_stream_format(RATE_HZ, 1)
        processor.set_reverse_stream_format(RATE_HZ, 1)

        def process(mic: np.ndarray, reference: np.ndarray) -> np.ndarray:
            processor.process_reverse_stream(reference.tobytes())
            return np.frombuffer(processor.process_stream(mic.tobytes()), np.int16)

        return Cancelled(in_frames(clip.truth.mic, clip.truth.reference, HOP, AEC3_DELAY, process))

    return lambda clips: [cancel_one(clip) for clip in clips]


def in_frames(
    mic: np.ndarray,
    reference: np.ndarray,
    frame: int,
    delay: int,
    process: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Both (S,) float32 as 16 bit through ``process`` frame by frame; its output (S,), ``delay`` samples earlier."""
    samples = len(mic)
    padded = np.pad(np.stack([mic, reference]), ((0, 0), (0, delay + -(samples + delay) % frame)))
    whole = np.clip(np.round(padded * 32768.0), -32768, 32767).astype(np.int16)
    parts = (slice(begin, begin + frame) for begin in range(0, whole.shape[1], frame))
    output = np.concatenate([process(whole[0, part], whole[1, part]) for part in parts])
    return output[delay : delay + samples].astype(np.float32) / np.float32(32768.0)


def load_speex() -> ctypes.CDLL:
    """The library, that of the environment variable SPEEXDSP_LIB or the system's.

    Raises:
        NotInstalledError: there is none.
    """
    names = [os.environ.get("SPEEXDSP_LIB"), find_library("speexdsp"), "libspeexdsp.so.1"]
    for name in filter(None, names):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.speex_echo_state_init.restype = ctypes.c_void_p
        library.speex_preprocess_state_init.restype = ctypes.c_void_p
        return library
    raise NotInstalledError("libspeexdsp not found: apt install libspeexdsp1, or name the file in SPEEXDSP_LIB")


def through_speex(library: ctypes.CDLL, mic: np.ndarray, reference: np.ndarray, suppress: bool) -> Cancelled:
    """One clip (S,); the preprocessor's frames overlap, so it gives each a frame late, which is taken off."""
    echo = ctypes.c_void_p(library.speex_echo_state_init(SPEEX_FRAME, SPEEX_TAIL))
    after = ctypes.c_void_p(library.speex_preprocess_state_init(SPEEX_FRAME, RATE_HZ))
    library.speex_echo_ctl(echo, _RATE, ctypes.byref(ctypes.c_int(RATE_HZ)))
    library.speex_preprocess_ctl(after, _ECHO_STATE, echo)

    def process(mic_frame: np.ndarray, reference_frame: np.ndarray) -> np.ndarray:
        output = np.empty(SPEEX_FRAME, np.int16)
        frames = (mic_frame.copy(), reference_frame.copy(), output)
        library.speex_echo_cancellation(echo, *(frame.ctypes.data_as(ctypes.c_void_p) for frame in frames))
        if suppress:
            library.speex_preprocess_run(after, output.ctypes.data_as(ctypes.c_void_p))
        return output

    try:
        return Cancelled(in_frames(mic, reference, SPEEX_FRAME, SPEEX_FRAME if suppress else 0, process))
    finally:
        library.speex_preprocess_state_destroy(after)
        library.speex_echo_state_destroy(echo)
