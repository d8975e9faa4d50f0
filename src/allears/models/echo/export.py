"""One step of the echo canceller as an ONNX file, whose state goes in and comes out, and what a step costs.

The file takes a hop of microphone and of reference and every tensor of the state, and gives a hop of the near end (of
the hop before), what is heard, and every tensor of the next state. The state before the first hop is zeros but for
``levels``; ``OnnxGraph`` (``runtime.py``) reads it from the file. Complex numbers, which ONNX lacks, do not occur: both
transforms are products with matrices. A file between spectra leaves them out, for streams of any rate that have their
own (``own_rate.py``); its state has no signals and no tail. Shapes: B = 1, N samples of a frame, F bins.
"""

import json
import os
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from allears.audio.stft_matrix import analysis_matrix, synthesis_matrix
from allears.core.errors import require
from allears.models.echo.model import EchoNet, EchoState, Heard
from allears.models.echo.runtime import (
    ALIGNMENT,
    INITIAL,
    MIC,
    NEAR,
    NEXT,
    REFERENCE,
    SPECTRA,
    SPECTRUM,
    VOICE,
    OnnxNet,
    OnnxStep,
)
from allears.nn.causal import fuse_norms

_OPSET = 17
_OF_TRANSFORMS = ("signals", "tail")  # of a state: what a file between spectra does not carry

Hops = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A hop (hop,) of microphone and reference to one of the near end."""


def name_state(state: EchoState) -> dict[str, Tensor]:
    """Every tensor of a state by a name that tells its place: ``tail``, ``align_keys``, ``stages_0_down_1``."""
    named: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            named[name] = value
        elif isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            for field, part in zip(fields, value, strict=True):
                walk(part, f"{name}_{field}" if name else str(field))

    walk(state, "")
    return named


def fill_state(like: EchoState, named: dict[str, Tensor]) -> EchoState:
    """A state with the tensors of ``named``, in the form of ``like``: the inverse of :func:`name_state`."""
    values = iter(named[name] for name in name_state(like))

    def build(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(values)
        if isinstance(value, tuple):
            parts = [build(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return cast(EchoState, build(like))


class _RealStep(nn.Module):
    """A step in real numbers: (1, hop) twice and the tensors of the state, to the tensors that the file gives."""

    def __init__(self, net: EchoNet) -> None:
        super().__init__()
        self.net = net
        self._like = net.initial_state(1)
        self.register_buffer("analysis", analysis_matrix(net.stft))
        self.register_buffer("synthesis", synthesis_matrix(net.stft))

    def forward(self, mic: Tensor, reference: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = fill_state(self._like, dict(zip(name_state(self._like), tensors, strict=True)))
        signals = torch.cat([state.signals, torch.stack([mic, reference], dim=1)], dim=2)
        spectra = (signals @ self.analysis).reshape(1, 2, 2, 1, -1)
        spectrum, heard, following = self.net.cancel(spectra, state)
        early, late = (spectrum.reshape(1, -1) @ self.synthesis).chunk(2, dim=1)
        following = following._replace(signals=signals[:, :, -self.net.config.hop :], tail=late)
        return (state.tail + early, *_present(heard).values(), *name_state(following).values())


class _SpectralStep(nn.Module):
    """A step between spectra: (1, 2, 2, 1, F) and the tensors of the state, to the tensors that the file gives."""

    def __init__(self, net: EchoNet) -> None:
        super().__init__()
        self.net = net
        self._like = net.initial_state(1)

    def forward(self, spectra: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(_between(self._like), tensors, strict=True))
        spectrum, heard, following = self.net.cancel(spectra, fill_state(self._like, name_state(self._like) | named))
        return (spectrum, *_present(heard).values(), *_between(following).values())


def _between(state: EchoState) -> dict[str, Tensor]:
    return {name: value for name, value in name_state(state).items() if name not in _OF_TRANSFORMS}


def _present(heard: Heard) -> dict[str, Tensor]:
    facts = {
        ALIGNMENT: None if heard.alignment is None else heard.alignment[:, 0],
        VOICE: None if heard.voice is None else heard.voice[:, 0],
    }
    return {name: value for name, value in facts.items() if value is not None}


def export_onnx(net: EchoNet, path: str | Path, spectra: bool = False) -> Path:
    """Write one step of ``net`` as an ONNX file for one microphone.

    Args:
        net: trained or not; it stays as it is.
        path: where to; a file there is replaced when the new one is complete.
        spectra: from spectra to a spectrum, for :class:`OnnxNet`; by default from hops to hops.

    Raises:
        ValueError: the network of the pretraining, which wants a linear canceller beside it.
        MissingDependencyError: the package ``onnx`` is not installed.
    """
    if net.config.linear_input:
        raise ValueError("net: linear_input=True given; transfer its weights to a network without, and export that")
    onnx = require("onnx", "onnx", "writing an ONNX file")
    plain = deepcopy(net).cpu().eval().requires_grad_(False)
    fuse_norms(plain)
    state, hop = name_state(plain.initial_state(1)), torch.zeros(1, net.config.hop)
    step, signals, made = _RealStep(plain), {MIC: hop, REFERENCE: hop}, NEAR
    if spectra:
        state = _between(plain.initial_state(1))
        step, signals, made = _SpectralStep(plain), {SPECTRA: torch.zeros(1, 2, 2, 1, net.config.bins)}, SPECTRUM
    facts = [name for name, wanted in ((ALIGNMENT, plain.align), (VOICE, plain.voice)) if wanted is not None]
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer: which of Python's values stay as they are
            torch.onnx.export(
                step.eval(),
                (*signals.values(), *state.values()),
                str(partial),
                input_names=[*signals, *state],
                output_names=[made, *facts, *(NEXT + name for name in state)],
                opset_version=_OPSET,
                dynamo=False,
            )
        model = onnx.load(str(partial))
        onnx.helper.set_model_props(model, {INITIAL: json.dumps(state["levels"].tolist())})
        onnx.save(model, str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def as_onnx(net: EchoNet, threads: int = 1) -> OnnxNet:
    """The network behind an ONNX file of it that is kept in memory, for :class:`allears.models.echo.EchoCanceller`.

    Raises:
        MissingDependencyError: ``onnx`` or ``onnxruntime`` is not installed.
    """
    require("onnxruntime", "onnx", "running an ONNX file")
    with TemporaryDirectory() as folder:
        path = export_onnx(net, Path(folder) / "net.onnx", spectra=True)
        return OnnxNet(path.read_bytes(), net.config, threads)


class TorchStep:
    """The same by PyTorch, of a network whose batch norms are worked in."""

    def __init__(self, net: EchoNet) -> None:
        self._net = deepcopy(net).cpu().eval().requires_grad_(False)
        fuse_norms(self._net)
        self._state = self._net.initial_state(1)
        self.facts: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def __call__(self, mic: np.ndarray, reference: np.ndarray) -> np.ndarray:
        hops = torch.from_numpy(mic)[None], torch.from_numpy(reference)[None]
        near, heard, self._state = self._net.step(*hops, self._state)
        named = zip((ALIGNMENT, VOICE), heard, strict=True)
        self.facts = {name: value.numpy() for name, value in named if value is not None}
        return near[0].numpy()


def check_onnx(net: EchoNet, path: str | Path, hops: int = 50, seed: int = 0) -> float:
    """The largest difference between ``net`` and the file at ``path``, of either kind, over so many hops of normal
    noise whose level changes, frame by frame: of the near end, over its largest sample, and of alignment and voice."""
    ours, theirs = TorchStep(net), OnnxStep(path)
    rng, apart, peak, told = np.random.default_rng(seed), 0.0, 1e-12, [0.0]
    for _ in range(hops):
        level = 10 ** rng.uniform(-3, -0.5)
        mic, reference = (level * rng.standard_normal((2, net.config.hop))).astype(np.float32)
        wanted, got = ours(mic, reference), theirs(mic, reference)
        if ours.facts.keys() != theirs.facts.keys():
            raise ValueError(f"path: {path} tells {sorted(theirs.facts)} of a frame, wanted {sorted(ours.facts)}")
        peak = max(peak, float(np.abs(wanted).max()))
        apart = max(apart, float(np.abs(got - wanted).max()))
        told += [float(np.abs(theirs.facts[name] - fact).max()) for name, fact in ours.facts.items()]
    return max([apart / peak, *told])


@dataclass(frozen=True)
class StepCost:
    """What a hop costs: the mean and the 99th percentile, and the mean over the hop's length."""

    mean_ms: float
    p99_ms: float
    rtf: float


def step_cost(run: Hops, hop: int, hop_s: float, hops: int = 1000, warm_up: int = 50) -> StepCost:
    """Time ``run`` (:class:`TorchStep` or :class:`OnnxStep`) hop by hop on noise. PyTorch uses as many threads as it is
    set to: ``torch.set_num_threads(1)`` for one."""
    rng = np.random.default_rng(0)
    signals = (0.1 * rng.standard_normal((hops + warm_up, 2, hop))).astype(np.float32)
    times = np.empty(hops + warm_up)
    for index, (mic, reference) in enumerate(signals):
        begun = time.perf_counter()
        run(mic, reference)
        times[index] = time.perf_counter() - begun
    taken = 1000.0 * times[warm_up:]
    return StepCost(float(taken.mean()), float(np.percentile(taken, 99)), float(taken.mean() / 1000.0 / hop_s))
