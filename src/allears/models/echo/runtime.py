"""Running the ONNX file of one step (``export.py``) by onnxruntime: one stream hop by hop, or as a pipeline's network.

Shapes: M microphones, T frames, D delays; a hop is what the network's configuration says.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allears.core.errors import require
from allears.models.echo.config import EchoConfig
from allears.models.echo.model import Heard

MIC, REFERENCE, NEAR, ALIGNMENT, VOICE = "mic", "reference", "near", "alignment", "voice"
"""Names in the file: (1, hop) the first three, (1, D) and (1,) the others, where the network has them."""

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

    def initial(self) -> State:
        """The state before the first hop."""
        given = [tensor for tensor in self._session.get_inputs() if tensor.name not in (MIC, REFERENCE)]
        state = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in given}
        return {**state, "levels": np.asarray(self._levels, np.float32)}

    def run(self, mic: np.ndarray, reference: np.ndarray, state: State) -> tuple[np.ndarray, State, State]:
        """The next hop of both, (1, hop), to one of the near end, (1, hop), what is heard by its name, and the next
        state."""
        made = dict(zip(self._outputs, self._session.run(None, {MIC: mic, REFERENCE: reference, **state}), strict=True))
        heard = {name: made[name] for name in (ALIGNMENT, VOICE) if name in made}
        return made[NEAR], heard, {name: made[NEXT + name] for name in state}


class OnnxStep:
    """A stream through an ONNX file: hop after hop, the state kept here.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self._graph = OnnxGraph(path, threads)
        self.state = self._graph.initial()
        self.facts: State = {}

    def __call__(self, mic: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The next hop of both, (hop,), to one of the near end; ``facts`` holds what was heard."""
        near, self.facts, self.state = self._graph.run(mic[None], reference[None], self.state)
        return near[0]


class OnnxNet:
    """The file where an ``EchoNet`` stands in a stream: the same calls, hop by hop and microphone by microphone inside.

    Args:
        file: path or bytes of the file.
        config: of the network that it was written from.
        threads: of onnxruntime.
    """

    def __init__(self, file: str | Path | bytes, config: EchoConfig, threads: int = 1) -> None:
        self.config = config
        self._graph = OnnxGraph(file, threads)

    def initial_state(self, batch: int) -> list[State]:
        """Of so many microphones before their first sample."""
        return [self._graph.initial() for _ in range(batch)]

    def advance(self, mic: Tensor, reference: Tensor, state: list[State]) -> tuple[Tensor, Heard, list[State]]:
        """T hops of both, (M, T hop), to (M, T hop) of the near end (of a hop before), what is heard of the frames,
        (M, T, D) and (M, T), and the next states."""
        rows = [self._follow(*row) for row in zip(mic.numpy(), reference.numpy(), state, strict=True)]
        near = torch.from_numpy(np.stack([row[0] for row in rows]))
        told = {
            name: torch.from_numpy(np.stack([row[1][name] for row in rows]))
            for name in (ALIGNMENT, VOICE)
            if name in rows[0][1]
        }
        return near, Heard(told.get(ALIGNMENT), told.get(VOICE)), [row[2] for row in rows]

    def _follow(self, mic: np.ndarray, reference: np.ndarray, state: State) -> tuple[np.ndarray, State, State]:
        """One microphone, (T hop,)."""
        hop, near, heard = self.config.hop, [], []
        for begin in range(0, len(mic), hop):
            span = slice(begin, begin + hop)
            made, facts, state = self._graph.run(mic[None, span], reference[None, span], state)
            near.append(made[0])
            heard.append(facts)
        return np.concatenate(near), {name: np.concatenate([f[name] for f in heard]) for name in heard[0]}, state
