"""This library's separator: with its pipeline, its network alone, and that network as ONNX.

A system of ``separate`` is a callable (T,) float32 at 16 kHz -> (J, T) float32.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import NotInstalledError, Separate, system


@system("separate", about="allears.models.separate")
def allears(**options: Any) -> Separate:
    """``options`` go to ``Separator.from_pretrained``."""
    separator = _load(options)

    def separate(audio: np.ndarray) -> np.ndarray:
        return np.asarray(separator(audio, sample_rate_hz=16_000).talkers)

    def process_file(source: Path, folder: Path) -> None:
        separator.process_file(source, folder, all_outputs=True)

    separate.process_file = process_file  # type: ignore[attr-defined]  # the speed case measures it
    return separate


@system("separate", about="the network of allears alone, in PyTorch, the clip at once")
def network(**options: Any) -> Separate:
    """``options`` go to ``Separator.from_pretrained``."""
    import torch

    separator = _load(options)

    def separate(audio: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return separator.net(torch.from_numpy(audio)[None].to(separator.device))[0].float().cpu().numpy()

    separate.separator = separator  # type: ignore[attr-defined]  # the speed case exports its network
    return separate


@system("separate", needs=("onnxruntime",), about="the network of allears alone, in onnxruntime, the clip at once")
def onnx(path: str) -> Separate:
    """``path`` is what ``export_onnx`` wrote; it runs on as many threads as the process has cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    cores = getattr(os, "sched_getaffinity", None)
    options.intra_op_num_threads = len(cores(0)) if cores else os.cpu_count() or 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda audio: np.asarray(session.run(None, {name: audio[None]})[0])[0]


def _load(options: dict[str, Any]) -> Any:
    from allears.core.errors import WeightsError

    try:
        from allears.models.separate.pipeline import Separator

        return Separator.from_pretrained(**options)
    except (ImportError, WeightsError) as error:
        raise NotInstalledError(str(error)) from error
