"""What computes: one step of the echo canceller for many sessions, by onnxruntime or by PyTorch.

Steps go from spectra to spectra, so that sessions of all rates share them; the transforms are each session's own.

Shapes: B sessions of a group, T hops, F bins, D delays.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from allears.core.errors import require
from allears.models.echo.config import EchoConfig
from allears.models.echo.export import check_onnx, export_onnx, fill_state, name_state
from allears.models.echo.model import EchoNet, EchoState, Heard
from allears.models.echo.runtime import ALIGNMENT, SPECTRA, VOICE, OnnxGraph, State
from allears.models.echo.stream import EchoCore
from allears.serve.combine import Combiner

logger = logging.getLogger(__name__)

ENGINES = ("auto", "onnx", "torch")
_SAME = 1e-3  # of the largest sample: what onnxruntime may differ by


class Hop(NamedTuple):
    """A step of one session: ``spectra`` (2, 2, F), microphone and reference, real and imaginary parts; its state."""

    spectra: np.ndarray
    state: Any


class Made(NamedTuple):
    """``spectrum`` (2, F) of the near end, ``alignment`` (D,) and ``voice``, where the network tells them, and the next
    state."""

    spectrum: np.ndarray
    alignment: np.ndarray | None
    voice: float | None
    state: Any


class Steps(Protocol):
    """Steps of one model; safe to call from as many threads as there are workers."""

    name: str
    config: EchoConfig
    most: int
    """Sessions of a group."""

    def initial(self) -> Any: ...

    def run(self, hops: Sequence[Hop]) -> list[Made]: ...


class TorchSteps:
    """By PyTorch: the states of a group are put together, stepped at once, and taken apart.

    Args:
        net: at rest, its batch norms worked in.
    """

    name = "pytorch"
    most = 8

    def __init__(self, net: EchoNet) -> None:
        self._net, self.config = net, net.config
        one, two = (name_state(net.initial_state(batch)) for batch in (1, 2))
        self._places = {
            name: next(dim for dim, size in enumerate(value.shape) if two[name].shape[dim] != size)
            for name, value in one.items()
        }
        """Of each tensor of a state the dimension in which sessions lie, one behind the other."""

    def initial(self) -> EchoState:
        return self._net.initial_state(1)

    @torch.inference_mode()
    def run(self, hops: Sequence[Hop]) -> list[Made]:
        states = [name_state(hop.state) for hop in hops]
        together = {name: torch.cat([state[name] for state in states], dim) for name, dim in self._places.items()}
        spectra = torch.from_numpy(np.stack([hop.spectra for hop in hops]))[:, :, :, None]
        like = hops[0].state
        made, heard, following = self._net.cancel(spectra, fill_state(like, together))
        parted = {name: value.chunk(len(hops), self._places[name]) for name, value in name_state(following).items()}
        return [
            Made(
                made[index, :, 0].numpy(),
                None if heard.alignment is None else heard.alignment[index, 0].numpy(),
                None if heard.voice is None else float(heard.voice[index, 0]),
                fill_state(like, {name: parts[index] for name, parts in parted.items()}),
            )
            for index in range(len(hops))
        ]


class OnnxSteps:
    """By onnxruntime: the file takes one session at a time, and is quicker all the same.

    Args:
        graph: of a file between spectra that ``export_onnx`` wrote; one thread of its own for each call.
        config: of its network.
    """

    name = "onnxruntime"
    most = 1

    def __init__(self, graph: OnnxGraph, config: EchoConfig) -> None:
        self._graph, self.config = graph, config

    def initial(self) -> State:
        return self._graph.initial()

    def run(self, hops: Sequence[Hop]) -> list[Made]:
        return [self._step(*hop) for hop in hops]

    def _step(self, spectra: np.ndarray, state: State) -> Made:
        made, heard, following = self._graph.run({SPECTRA: spectra[None, :, :, None]}, state)
        alignment = heard[ALIGNMENT][0] if ALIGNMENT in heard else None
        return Made(made[0, :, 0], alignment, float(heard[VOICE][0]) if VOICE in heard else None, following)


class Engine:
    """A network (``Network``) of live sessions with one microphone each, whose hops go, with those of other sessions,
    through ``steps``.

    Args:
        steps: what computes.
        workers: groups of hops at a time, a core each.
    """

    def __init__(self, steps: Steps, workers: int) -> None:
        self.steps, self.workers, self.config, self.name = steps, workers, steps.config, steps.name
        self.threads = workers * steps.most
        self._combine: Combiner[Hop, Made] = Combiner(steps.run, workers, steps.most)

    def initial_state(self, batch: int) -> Any:
        """Of one session (``batch`` 1)."""
        assert batch == 1
        return self.steps.initial()

    def cancel(self, spectra: Tensor, state: Any) -> tuple[Tensor, Heard, Any]:
        """Spectra (1, 2, 2, T, F) to that of the near end, (1, 2, T, F), what is heard ((1, T, D) and (1, T)), and the
        next state."""
        made = []
        for frame in spectra[0].permute(2, 0, 1, 3).contiguous().numpy():
            step = self._combine(Hop(frame, state))
            made.append(step)
            state = step.state
        spectrum = torch.from_numpy(np.stack([step.spectrum for step in made], axis=1))[None]
        alignment, voice = None, None
        if made[0].alignment is not None:
            alignment = torch.from_numpy(np.stack([step.alignment for step in made if step.alignment is not None]))
        if made[0].voice is not None:
            voice = torch.tensor([step.voice for step in made])
        heard = Heard(*(None if value is None else value[None] for value in (alignment, voice)))
        return spectrum, heard, state


def choose_engine(net: EchoNet, name: str, workers: int) -> Engine:
    """An engine for ``net`` (on the CPU, batch norms worked in).

    Args:
        net: to run; it stays as it is.
        name: ``onnx``, ``torch``, or ``auto``: ONNX where the packages are installed.
        workers: as of :class:`Engine`.

    Raises:
        ValueError: an unknown name, or onnxruntime's output is not PyTorch's.
        MissingDependencyError: ``onnx`` was asked for, and its packages are missing.
    """
    if name not in ENGINES:
        raise ValueError(f"engine: {name!r} given; one of {', '.join(ENGINES)} is wanted")
    have = all(find_spec(package) is not None for package in ("onnx", "onnxruntime"))
    if name == "torch" or (name == "auto" and not have):
        if name == "auto":
            logger.warning("onnx and onnxruntime are not installed: PyTorch computes, and fewer sessions fit")
        return Engine(TorchSteps(net), workers)
    require("onnxruntime", "onnx", "the engine onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(net, Path(folder) / "echo.onnx", spectra=True)
        if not (apart := check_onnx(net, path)) < _SAME:
            raise ValueError(f"engine: onnxruntime differs from PyTorch by {apart:.2g}; use --engine torch")
        return Engine(OnnxSteps(OnnxGraph(path), net.config), workers)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hops_per_s(engine: Engine, seconds: float = 1.0) -> float:
    """Hops a second that the engine makes with all of its threads at work, transforms at its own rate included."""
    counts, begun = [0] * engine.threads, time.perf_counter()
    noise = (0.1 * np.random.default_rng(0).standard_normal((2, engine.config.hop))).astype(np.float32)

    def work(index: int) -> None:
        core = EchoCore(engine, 1)
        while time.perf_counter() < begun + seconds:
            core.push(noise)
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(engine.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)
