"""Stages of training the video model: few frames first, which are cheap and show colours, shapes and places, then whole
clips. One run, one optimiser, one learning rate: what changes between two steps is the batch.

Shapes: B clips, L tokens, H heads, D head size.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from allears.core.config import from_dict
from allears.models.video.config import VideoConfig
from allears.models.video.loss import FlowLoss
from allears.models.video.model import VideoNet, call_block
from allears.ops.attention import Choice, explain
from allears.recipes.video_data import Part, PartData
from allears.train.graphs import graphed

log = logging.getLogger(__name__)

Way = Literal["eager", "graphs", "compile"]
"""How the network's passes run: as they are, as CUDA graphs, or with blocks by ``torch.compile``."""
_WARM_STEPS, _TIMED_STEPS = 3, 6


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        frames: of the clips it shows; see :class:`~allears.recipes.video_data.Part`.
        share: of the run's time, or of its steps where these are given, relative to the other stages.
        batch: clips, or parts of clips, a step.
        way: how the network runs; ``None``: as the recipe is told.
        spread: see :class:`~allears.recipes.video_data.Part`.
        mean: of logit t, in place of the loss's; by default that of the loss, less a quarter of the logarithm of how
            many times fewer frames there are. As much noise hides more of a clip that has fewer pixels: by half of the
            logarithm, were all pixels alike (Esser et al., 2024), but then high times, at which it is decided what goes
            where, were learnt too late.

    Raises:
        ValueError: a number is not positive, or the way unknown.
    """

    frames: int
    share: float
    batch: int
    way: Way | None = None
    spread: bool = True
    mean: float | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "share", "batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"stages: {name} {getattr(self, name)} given; wanted more than 0")
        if self.way is not None and self.way not in get_args(Way):
            raise ValueError(f"stages: way {self.way!r} is unknown; known are {', '.join(get_args(Way))}")

    @property
    def part(self) -> Part:
        return Part(self.frames, self.spread)

    def loss(self, options: FlowLoss, config: VideoConfig) -> FlowLoss:
        """``options`` with the flow times of this stage."""
        fewer = config.frames / self.frames if self.spread else 1.0
        mean = options.mean - 0.25 * math.log(fewer) if self.mean is None else self.mean
        return replace(options, mean=mean)


def read_stages(given: Sequence[object]) -> tuple[Stage, ...]:
    """Stages as they are, as (frames, share, batch) with more fields behind, or as mappings of their fields.

    Raises:
        ValueError: one is none of these, or a field is unknown or out of its range.
    """
    names = ("frames", "share", "batch", "way", "spread", "mean")
    found = []
    for item in given:
        if isinstance(item, (list, tuple)) and 3 <= len(item) <= len(names):
            item = dict(zip(names, item, strict=False))
        found.append(item if isinstance(item, Stage) else from_dict(Stage, item, "stages"))
    return tuple(found)


def first_steps(stages: Sequence[Stage], steps: int) -> list[int]:
    """The step with which each stage begins, of so many in all."""
    whole, before = sum(stage.share for stage in stages), 0.0
    found = []
    for stage in stages:
        found.append(round(steps * before / whole))
        before += stage.share
    return found


class Stages:
    """The stages of a run, ready to draw from.

    Args:
        config: of the network.
        stages: first to last, one at least.
        options: of the loss, for whole clips.
        seed: of the draws.
        device: to paint on.
        way: of stages that name none.
        processes: that draw what is painted; 0: a thread does.

    Raises:
        ValueError: there are none, or a stage does not fit the configuration.
    """

    def __init__(
        self,
        config: VideoConfig,
        stages: Sequence[Stage],
        options: FlowLoss,
        seed: int,
        device: torch.device,
        way: Way = "eager",
        processes: int = 0,
    ) -> None:
        if not stages:
            raise ValueError("stages: none given; name one at least, or leave them out")
        self.config, self.stages, self.device = config, tuple(stages), device
        # Spawned, not forked: a process with a GPU must not be copied.
        self.pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes else None
        self.data = [
            PartData(config, s.batch, seed + 1000 * i, device, s.part, self.pool, 2 * processes)
            for i, s in enumerate(stages)
        ]
        self.losses = [stage.loss(options, config) for stage in stages]
        self.ways: list[Way] = [stage.way or way for stage in stages]
        self.begins: list[int] = [0]
        """First step of each stage that has begun; of all, where the run has so many steps."""
        self._graphed = -1
        self._compiled: Callable[..., Tensor] | None = None  # one for all stages: a shape is compiled once

    def close(self) -> None:
        """End the processes that draw."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def index(self, step: int) -> int:
        """Of the stage that ``step`` belongs to, of those whose beginning is known."""
        return max(i for i, begin in enumerate(self.begins) if begin <= step or i == 0)

    def tell(self, step: int, done: float) -> None:
        """Before ``step`` a share ``done`` (0 to 1) of the run is over: the stage for it begins, if it has not yet."""
        whole, before = sum(stage.share for stage in self.stages), 0.0
        for index, stage in enumerate(self.stages):
            if index >= len(self.begins) and done * whole >= before:
                self.begins.append(step)
            before += stage.share

    def use(self, model: nn.Module, index: int, sample: tuple[Tensor, ...]) -> None:
        """Let ``model`` run as this stage does; ``sample`` are inputs of it, without places where it has none."""
        net: VideoNet = model  # type: ignore[assignment]
        if self.ways[index] == "compile":
            self._compiled = self._compiled or torch.compile(call_block, dynamic=False)
            net.training_block = self._compiled
        else:
            net.training_block = call_block
        if self._graphed != index:
            release(model)
            self._graphed = -1
        if self.ways[index] == "graphs" and self._graphed < 0:
            graphed(model, *sample)
            self._graphed = index

    def chosen_kernel(self, net: VideoNet, index: int) -> Choice:
        """Which kernel attention over space and time takes in this stage, and why no other."""
        tokens = self.config.with_frames(self.stages[index].frames).tokens
        layer = net.attentions()[0]
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        q = torch.empty(1, tokens, layer.heads, layer.head_dim, device=self.device, dtype=dtype, requires_grad=True)
        return explain(q, q, q, layer.spec)


def release(model: nn.Module) -> None:
    """Undo :func:`allears.train.graphs.graphed`, which puts its own ``forward`` on a module."""
    vars(model).pop("forward", None)


@contextmanager
def no_traces(model: nn.Module) -> Generator[None]:
    """Whatever is done inside leaves no gradients behind."""
    mode = model.training
    model.train()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(mode)


def time_stages(stages: Stages, net: VideoNet, step: Callable[[int, int], None], device: torch.device) -> list[float]:
    """Compile or capture every stage, last to first, and time it: seconds a step of each, without the optimiser.

    Args:
        step: called with an index of a stage and a number; must run a pass forward and backward.
    """

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    found: list[float] = []
    with no_traces(net):
        for index in reversed(range(len(stages.stages))):
            began = wait()
            for number in range(_WARM_STEPS):
                step(index, number)
            ready = wait()
            for number in range(_WARM_STEPS, _WARM_STEPS + _TIMED_STEPS):
                step(index, number)
            found.append((wait() - ready) / _TIMED_STEPS)
            stage = stages.stages[index]
            kernel = stages.chosen_kernel(net, index).kernel
            log.info(
                "stage %d of %d: %d frames, %d tokens, batch %d, %s, attention by %s: ready in %.1f s, %.1f ms a step",
                index + 1,
                len(stages.stages),
                stage.frames,
                stages.config.with_frames(stage.frames).tokens,
                stage.batch,
                stages.ways[index],
                kernel,
                ready - began,
                1e3 * found[-1],
            )
    return found[::-1]
