"""Capturing what runs on a GPU as a CUDA graph."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(function: Callable[[], T], device: torch.device, warm_calls: int = 0) -> tuple[torch.cuda.CUDAGraph, T]:
    """A call as a graph, and what it gave: each replay writes into that, and reads what the call read where it lies.

    Args:
        function: must not read values back from the GPU.
        device: a CUDA device.
        warm_calls: made before on a stream of their own, so that what is compiled or made at first use is no part of
            the graph.

    Raises:
        RuntimeError: the call does what a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        if warm_calls:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(warm_calls):
                    function()
            torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph):
            found = function()
    return graph, found
