"""Queries, keys and values of every attention layer of a model on a calibration set, in bounded memory.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allears.core.errors import WeightsError
from allears.core.progress import OnProgress, Progress
from allears.ops.attention import AttentionSpec, attention
from allears.turbo.sparse.fit import Sample
from allears.turbo.sparse.taps import tap

log = logging.getLogger(__name__)

_INDEX = "recording.json"


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a recorded layer.

    Args:
        heads, kv_heads, head_dim: H, G and D.
        causal, scale: of its attention.
        seen: sequences that passed it.
        kept: samples of them.
        dense_because: why it cannot be sparse; empty if it can.
    """

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    scale: float
    seen: int = 0
    kept: int = 0
    dense_because: str = ""


class Recording:
    """Facts and samples of each layer; samples are in memory, or in ``folder`` as one safetensors file each.

    Args:
        folder: where samples are written; ``None`` keeps them in memory, in the dtype in which they came.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.layers: dict[str, LayerFacts] = {}
        self._held: dict[tuple[str, int], Sample] = {}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Recording":
        """A recording that :func:`record` has finished in ``folder``.

        Raises:
            WeightsError: there is none.
        """
        found, index = cls(folder), Path(folder) / _INDEX
        if not index.is_file():
            raise WeightsError(f"recording {str(index)!r}: no such file; the recording is not there or not finished")
        found.layers = {name: LayerFacts(**facts) for name, facts in json.loads(index.read_text()).items()}
        return found

    def samples(self, name: str) -> list[Sample]:
        """The samples of a layer, on the CPU."""
        return [self._get(name, index) for index in range(self.layers[name].kept)]

    def put(self, name: str, index: int, sample: Sample) -> None:
        """Keep a sample under a number, in the place of an earlier one."""
        parts = Sample(*(part.detach().to("cpu", copy=True).contiguous() for part in sample))
        if self.folder is None:
            self._held[name, index] = parts
        else:
            path = self._path(name, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(parts._asdict(), path)

    def finish(self) -> None:
        """Write the facts beside the samples: the recording is whole."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".{_INDEX}.part"
            part.write_text(json.dumps({name: asdict(facts) for name, facts in self.layers.items()}, indent=1))
            part.replace(self.folder / _INDEX)

    def _get(self, name: str, index: int) -> Sample:
        return self._held[name, index] if self.folder is None else Sample(**load_file(self._path(name, index)))

    def _path(self, name: str, index: int) -> Path:
        assert self.folder is not None
        return self.folder / (name or "model") / f"{index:04d}.safetensors"


@torch.no_grad()
def record(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 8,
    call: Callable[[nn.Module, Any], Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Recording:
    """Run ``model`` on ``batches`` and keep ``samples`` sequences of each layer, drawn evenly from all that pass it.

    Args:
        model: ours, or one of ``transformers`` or ``diffusers``; it runs as it is, in its mode and dtype.
        batches: what the model is called with: tensors, or tuples or dicts of arguments.
        samples: of each layer; what is held never grows beyond them (a reservoir, Vitter, 1985).
        call: how ``model`` is called with a batch, if not by its arguments: a sampler of several steps, say.
        folder: keep the samples here in place of memory. A finished recording in it is read, and nothing is run.
        seed: of the draw.

    Raises:
        ValueError: ``samples`` is below 1, the model has no attention that can be tapped, or no batch reached one.
    """
    if samples < 1:
        raise ValueError(f"samples: {samples} given; wanted at least 1 a layer")
    if folder is not None and (Path(folder) / _INDEX).is_file():
        log.info("the recording in %s is finished: it is read", folder)
        return Recording.load(folder)
    recording, draws = Recording(folder), random.Random(seed)

    def keep(name: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
        facts = recording.layers.get(name) or _facts_of(q, k, spec)
        reason = facts.dense_because or ("it attends with a mask" if mask is not None else "")
        for row in range(q.shape[0]):
            seen = facts.seen
            place = seen if seen < samples else draws.randrange(seen + 1)
            if place < samples and not reason:
                recording.put(name, place, Sample(q[row], k[row], v[row]))
            facts = replace(facts, seen=seen + 1, kept=0 if reason else min(seen + 1, samples))
        recording.layers[name] = replace(facts, dense_because=reason)
        return attention(q, k, v, spec, mask)

    total = len(batches) if isinstance(batches, Sized) else None
    with tap(model, keep):
        for done, batch in enumerate(batches, 1):
            (call or _call)(model, batch)
            if on_progress is not None:
                on_progress(Progress(done, total, "batches", "recording"))
    if not recording.layers:
        raise ValueError("batches: no attention layer ran; give at least one batch, and a model that attends")
    recording.finish()
    return recording


def _facts_of(q: Tensor, k: Tensor, spec: AttentionSpec) -> LayerFacts:
    scale = q.shape[-1] ** -0.5 if spec.scale is None else spec.scale
    return LayerFacts(q.shape[2], k.shape[2], q.shape[3], spec.causal, scale)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
