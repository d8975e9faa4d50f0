"""The tool: record a model's attention, fit every layer, keep what is good enough, and save it beside the weights."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import from_dict, to_dict
from allears.core.progress import OnProgress, Progress
from allears.core.weights import load_weights, read_sidecar, save_weights, weight_paths
from allears.turbo.sparse.install import KIND
from allears.turbo.sparse.record import LayerFacts, Recording, record
from allears.turbo.sparse.search import LayerReport, SparseSettings, search_layer

log = logging.getLogger(__name__)


def sparsify(
    model: nn.Module,
    batches: Iterable[Any] | Recording,
    out: str | os.PathLike[str],
    settings: SparseSettings | None = None,
    *,
    samples: int = 8,
    call: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
) -> list[LayerReport]:
    """Fit sparse-linear attention to every layer of ``model`` and save it as ``OUT.safetensors`` and ``OUT.json``.

    The model is not changed: :func:`apply` puts the layers in. Each finished layer is kept in the folder
    ``OUT.layers``, and a call that was interrupted goes on after it; the folder may be deleted afterwards.

    Args:
        model: ours, or one of ``transformers`` or ``diffusers``; in evaluation mode, on its device.
        batches: a calibration set, see :func:`record`; or a recording.
        out: path stem, such as that of the model's weights with ``-sparse`` behind it.
        settings: shares, the error that is allowed, and how to fit.
        samples, call: see :func:`record`.
        device: where layers are fitted; ``None``: the model's.
        on_progress: told of each batch, and of each layer's trials.

    Returns:
        A report for each layer, in the order in which they ran.

    Raises:
        ValueError: nothing can be recorded; or ``OUT.layers`` is of other settings.
    """
    settings = settings or SparseSettings()
    folder = weight_paths(out)[0].with_suffix(".layers")
    where = torch.device(device) if device is not None else next((p.device for p in model.parameters()), "cpu")
    recording = batches if isinstance(batches, Recording) else None
    if recording is None:
        assert not isinstance(batches, Recording)
        recording = record(model, batches, samples=samples, call=call, seed=settings.seed, on_progress=on_progress)
    reports, tensors = [], {}
    layers = recording.layers
    per_layer = len(settings.keeps) * settings.steps
    for index, (name, facts) in enumerate(layers.items()):
        stem = folder / (name or "model")
        found = _read_finished(stem, facts, settings)
        if found is None:
            found = _fit(
                name,
                facts,
                recording,
                settings,
                torch.device(where),
                stem,
                _teller(on_progress, index, len(layers), per_layer, name, settings),
            )
        report, state = found
        reports.append(report)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
        if on_progress is not None:
            what = "stays dense" if report.keep is None else f"{report.sparsity:.1%} sparse"
            on_progress(Progress(index + 1, len(layers), "layers", f"{name}: {what}"))
    document = {
        "kind": KIND,
        "settings": to_dict(settings),
        "layers": {report.name: {**asdict(report), "facts": asdict(layers[report.name])} for report in reports},
    }
    save_weights(out, tensors, document, dtype=None)
    return reports


def _fit(
    name: str,
    facts: LayerFacts,
    recording: Recording,
    settings: SparseSettings,
    device: torch.device,
    stem: Path,
    watch: Callable[[float, int, float], None] | None,
) -> tuple[LayerReport, dict[str, Tensor]]:
    report, core = search_layer(name, facts, recording.samples(name), settings, device, watch)
    state = {} if core is None else {key: value.cpu() for key, value in core.state_dict().items()}
    document = {"report": asdict(report), "facts": asdict(facts), "settings": to_dict(settings)}
    save_weights(stem, state, document, dtype=None)
    return report, state


def _read_finished(
    stem: Path, facts: LayerFacts, settings: SparseSettings
) -> tuple[LayerReport, dict[str, Tensor]] | None:
    if not all(path.is_file() for path in weight_paths(stem)):
        return None
    document = read_sidecar(stem)
    for what, wanted in (("settings", to_dict(settings)), ("facts", asdict(facts))):
        if document.get(what) != wanted:
            raise ValueError(
                f"out: {str(stem)!r} was fitted with other {what}; give another out, or delete {str(stem.parent)!r}"
            )
    report = from_dict(LayerReport, document["report"], "report")
    log.info("%s: fitted already", report.name)
    return report, load_weights(stem, dtype=None)[0]


def _teller(
    on_progress: OnProgress | None, index: int, layers: int, per_layer: int, name: str, settings: SparseSettings
) -> Callable[[float, int, float], None] | None:
    if on_progress is None:
        return None
    order = sorted(settings.keeps)

    def tell(keep: float, step: int, loss: float) -> None:
        share = (order.index(keep) * settings.steps + step) / per_layer
        on_progress(Progress(index + share, layers, "layers", f"{name}: keep {keep:g}, error {loss**0.5:.3f}"))

    return tell
