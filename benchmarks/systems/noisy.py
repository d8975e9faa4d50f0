"""The input itself: the line that everyone else is measured against."""

import numpy as np

from benchmarks.registry import Enhance, system


@system("enhance", about="the input, untouched")
def noisy() -> Enhance:
    return lambda audio: np.array(audio, dtype=np.float32)
