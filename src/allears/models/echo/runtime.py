"""Running the ONNX file of one step (``export.py``) by onnxruntime: one stream hop by hop, or as a pipeline's network.

A file is of one of two kinds: from hops to hops at the network's rate, or from spectra to a spectrum, which leaves the
transforms to the stream (``own_rate.py``). Shapes: M microphones, T frames, F bins, D delays; a hop is what the
network's configuration says.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allears.core.errors import require
from allears.models.echo.config import EchoConfig
from allears.models.echo.model import Heard
from allears.models.echo.own_rate import OwnRate

MIC, REFERENCE, NEAR, ALIGNMENT, VOICE = "mic", "reference", "near", "alignment", "voice"
"""Names in the file: (1, hop) the first three, (1, D) and (1,) the others, where the network has them."""

SPECTRA, SPECTRUM = "spectra", "spectrum"
"""In a file between spectra, in place of the first three: (1, 2, 2, 1, F), microphone and reference, real and imaginary
parts; and (1, 2, 1, F) of the near end."""

NEXT = "next_"
"""What the name of a state's tensor begins with where it comes out."""

INITIAL = "initial_levels"
"""Key of the file's metadata: the state before the first hop is zeros but for ``levels``, which are these."""

State = dict[str, np.ndarray]
"""Every tensor of a stream's state by its name in the file."""


class OnnxGraph:
    """The file, which keeps no stream: states go in and come out, so that any number of streams may share it.

    Args:
        file: its path, or its bytes.
        threads: of onnxruntime, 1 or more.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, file: str | Path | bytes, threads: int = 1) -> None:
        runtime = require("onnxruntime", "onnx", "running an ONNX file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        source = file if isinstance(file, bytes) else str(file)
        self._session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._levels = json.loads(self._session.get_modelmeta().custom_metadata_map[INITIAL])
        self._outputs = [output.name for output in self._session.get_outputs()]
        shapes = {tensor.name: tensor.shape for tensor in self._session.get_inputs()}
        self.bins: int | None = shapes[SPECTRA][-1] if SPECTRA in shapes else None
        """F of a file between spectra, ``None`` of one between hops."""

    def initial(self) -> State:
        """The state before the first hop."""
        given = [tensor for tensor in self._session.get_inputs() if tensor.name not in (MIC, REFERENCE, SPECTRA)]
        state = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in given}
        return {**state, "levels": np.asarray(self._levels, np.float32)}

    def run(self, signals: State, state: State) -> tuple[np.ndarray, State, State]:
        """The next step: ``mic`` and ``reference``, or ``spectra``, to ``near`` or ``spectrum``, what is heard by its
        name, and the next state."""
        made = dict(zip(self._outputs, self._session.run(None, {**signals, **state}), strict=True))
        heard = {name: made[name] for name in (ALIGNMENT, VOICE) if name in made}
        return made[self._outputs[0]], heard, {name: made[NEXT + name] for name in state}


class OnnxStep:
    """A stream through an ONNX file of either kind: hop after hop at the network's rate, the state kept here.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self._graph = OnnxGraph(path, threads)
        self.state = self._graph.initial()
        self.facts: State = {}
        bins = self._graph.bins
        self._around = None if bins is None else OwnRate(bins, bins - 1, 1)

    def __call__(self, mic: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The next hop of both, (hop,), to one of the near end; ``facts`` holds what was heard."""
        if self._around is None:
            near, self.facts, self.state = self._graph.run({MIC: mic[None], REFERENCE: reference[None]}, self.state)
            return near[0]
        spectra = self._around.analyse(torch.from_numpy(mic)[None], torch.from_numpy(reference)[None])
        made, self.facts, self.state = self._graph.run({SPECTRA: spectra.contiguous().numpy()}, self.state)
        return self._around.synthesise(torch.from_numpy(made))[0].numpy()


class OnnxNet:
    """A file between spectra where an ``EchoNet`` stands in a stream: the same calls, frame by frame and microphone by
    microphone inside.

    Args:
        file: path or bytes of the file.
        config: of the network that it was written from.
        threads: of onnxruntime.

    Raises:
        ValueError: a file from hops to hops.
    """

    def __init__(self, file: str | Path | bytes, config: EchoConfig, threads: int = 1) -> None:
        self.config = config
        self._graph = OnnxGraph(file, threads)
        if self._graph.bins is None:
            raise ValueError("file: one from hops to hops given; one of export_onnx(..., spectra=True) is wanted")

    def initial_state(self, batch: int) -> list[State]:
        """Of so many microphones before their first sample."""
        return [self._graph.initial() for _ in range(batch)]

    def cancel(self, spectra: Tensor, state: list[State]) -> tuple[Tensor, Heard, list[State]]:
        """Spectra (M, 2, 2, T, F) to that of the near end, (M, 2, T, F), what is heard of the frames, (M, T, D) and
        (M, T), and the next states."""
        rows = [self._follow(*row) for row in zip(spectra.numpy(), state, strict=True)]
        told = {
            name: torch.from_numpy(np.stack([row[1][name] for row in rows]))
            for name in (ALIGNMENT, VOICE)
            if name in rows[0][1]
        }
        made = torch.from_numpy(np.concatenate([row[0] for row in rows]))
        return made, Heard(told.get(ALIGNMENT), told.get(VOICE)), [row[2] for row in rows]

    def _follow(self, spectra: np.ndarray, state: State) -> tuple[np.ndarray, State, State]:
        """One microphone, (2, 2, T, F)."""
        made, heard = [], []
        for at in range(spectra.shape[2]):
            one, facts, state = self._graph.run({SPECTRA: spectra[None, :, :, at : at + 1]}, state)
            made.append(one)
            heard.append(facts)
        told = {name: np.concatenate([facts[name] for facts in heard]) for name in heard[0]}
        return np.concatenate(made, axis=2), told, state
