"""A call as a CUDA graph: what the GPU needs for it, without the time that launching its kernels one by one takes."""

from collections.abc import Callable

import torch
from torch import Tensor

from allears.bench.separate.nets import rel_err

_SAME = 1e-3


class GraphError(RuntimeError):
    """The call cannot be captured, or its replay gives something else."""


def captured(call: Callable[[int], Tensor], device: torch.device) -> Callable[[int], object]:
    """A call that replays ``call`` on the same inputs; its memory is held until it is dropped.

    Raises:
        GraphError: the capture fails, for instance since the call reads a value back; or the replay is not the same.
    """
    wanted = call(0)
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            call(0)
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph):
            out = call(0)
        graph.replay()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise GraphError(" ".join(str(error).split())[:200]) from error
    error = rel_err(out, wanted)
    if not error <= _SAME:
        raise GraphError(f"its replay differs from the call by {error:.3g}")
    return lambda index: graph.replay()
