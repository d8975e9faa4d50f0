"""RNNoise: Valin, "A Hybrid DSP/Deep Learning Approach to Real-Time Full-Band Speech Enhancement", MMSP 2018.

The library inside ``pyrnnoise`` is called with float frames; the package's own functions round to 16 bits."""

import ctypes

import numpy as np

from benchmarks.registry import Enhance, system

from .frames import through_48_khz

DELAY_SAMPLES = 960  # 20 ms at 48 kHz, measured by cross-correlation on clean speech
_FULL_SCALE = 32768.0  # the library counts in 16-bit steps


@system("enhance", needs=("pyrnnoise",), about="RNNoise, 48 kHz, 20 ms late (taken off)")
def rnnoise() -> Enhance:
    from pyrnnoise.rnnoise import FRAME_SIZE, create, destroy, lib

    samples = ctypes.POINTER(ctypes.c_float)

    def enhance(audio: np.ndarray) -> np.ndarray:
        state = create()

        def process(frame: np.ndarray) -> np.ndarray:
            scaled = frame * np.float32(_FULL_SCALE)
            pointer = scaled.ctypes.data_as(samples)
            lib.rnnoise_process_frame(state, pointer, pointer)
            return scaled / np.float32(_FULL_SCALE)

        try:
            return through_48_khz(audio, FRAME_SIZE, DELAY_SAMPLES, process)
        finally:
            destroy(state)

    return enhance
