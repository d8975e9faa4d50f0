"""Inference as a CUDA graph: a module of many small kernels at the cost of one launch, for one shape of inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

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
        self._graph = torch.cuda.CUDAGraph()
        device = samples[0].device
        with torch.cuda.device(device), torch.no_grad():
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # what is compiled or made at first use is no part of the graph
                for _ in range(_WARM_CALLS):
                    module(*samples)
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._output = module(*samples)

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
