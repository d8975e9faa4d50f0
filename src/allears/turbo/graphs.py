"""Inference as a CUDA graph: a module of many small kernels at the cost of one launch, for one shape of inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from allears.core.capture import capture

_WARM_CALLS = 3


class Replayed:
    """``module(*inputs)`` without gradients, captured once and replayed by every call.

    The module must not read values back from the GPU, and its weights must stay where they are; changes of their values
    are seen. Memory of a call, the output's too, is held until this is dropped.

    Args:
        module: what is captured, in the autocast and mode that are current now.
        samples: its inputs, on one CUDA device. The graph reads them where they lie: later calls copy their inputs into
            them, but for those that are the samples themselves.

    Raises:
        ValueError: a sample is not on a CUDA device.
        RuntimeError: the module does what a graph cannot hold.
    """

    def __init__(self, module: Callable[..., Tensor], *samples: Tensor) -> None:
        for sample in samples:
            if sample.device.type != "cuda":
                raise ValueError(f"samples: on {sample.device}; CUDA graphs take tensors on a CUDA device")
        self.inputs = samples
        with torch.no_grad():
            self._graph, self._output = capture(lambda: module(*samples), samples[0].device, _WARM_CALLS)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output for inputs shaped as the samples. The next call overwrites it.

        Raises:
            ValueError: the inputs are not shaped as the samples.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"inputs: {len(inputs)} given; the graph was captured with {len(self.inputs)}")
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is given:
                continue
            if own.shape != given.shape or own.dtype != given.dtype:
                raise ValueError(
                    f"inputs: {given.dtype} {tuple(given.shape)} given; the graph was captured for {own.dtype} "
                    f"{tuple(own.shape)}: make another Replayed for it"
                )
            own.copy_(given)
        self._graph.replay()
        return self._output


class GraphedForward:
    """A module's forward that replays itself as a CUDA graph, one for each shape of its arguments.

    The first call of a shape runs as always, the second is captured, and from then on calls replay. Calls with a
    gradient, on a CPU, or with arguments that cannot be compared run as always. Weights that moved are seen, and
    captured anew. Outputs are copies, so that the next call does not change them. Memory of a call is held for each
    graph; the graph that was used least recently is dropped where there are more than ``most``.

    Args:
        module: whose ``forward`` it is; the caller puts this object in its place.
        most: graphs that are held.
    """

    def __init__(self, module: nn.Module, most: int = 2) -> None:
        self.module, self.most = module, most
        self.forward = module.forward
        self.paused = False
        self._seen: set[Any] = set()
        self._graphs: dict[Any, _Captured] = {}

    def __len__(self) -> int:
        """Number of graphs held."""
        return len(self._graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        key = None if self.paused or torch.is_grad_enabled() else self._key(leaves, form)
        if key is None:
            return self.forward(*args, **kwargs)
        if key not in self._graphs and key not in self._seen:
            self._seen.add(key)
            return self.forward(*args, **kwargs)
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= self.most:
                self._graphs.pop(next(iter(self._graphs)))
            graph = _Captured(self.forward, leaves, form)
        self._graphs[key] = graph  # the last is the one used most recently
        return graph(leaves)

    def drop(self) -> None:
        """Give the graphs and their memory back."""
        self._graphs.clear()
        self._seen.clear()

    def _key(self, leaves: list[Any], form: Any) -> Any:
        """What a graph is made for; ``None``: this call cannot be one."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(tensor.device.type != "cuda" for tensor in tensors):
            return None
        weights = tuple(w.data_ptr() for w in (*self.module.parameters(), *self.module.buffers()))
        kind = tensors[0].device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        parts = tuple(
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        )
        try:
            key = (str(form), parts, weights, cast, torch.is_inference_mode_enabled())
            hash(key)
        except TypeError:
            return None
        return key


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Inside, a module whose forward is a :class:`GraphedForward` runs as always; any other does anyway."""
    graphed = module.forward
    if not isinstance(graphed, GraphedForward):
        yield
        return
    before, graphed.paused = graphed.paused, True
    try:
        yield
    finally:
        graphed.paused = before


class _Captured:
    """One graph of a function, its inputs and its outputs."""

    def __init__(self, function: Callable[..., Any], leaves: list[Any], form: Any) -> None:
        self.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(self.leaves, form)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        self.graph, self.output = capture(lambda: function(*args, **kwargs), device)

    def __call__(self, leaves: list[Any]) -> Any:
        for own, given in zip(self.leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self.graph.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.output)
