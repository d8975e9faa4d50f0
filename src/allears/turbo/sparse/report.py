"""What :func:`sparsify` found of each layer, read back from beside the weights, and as a table."""

import os
from typing import Any

from allears.core.config import from_dict
from allears.core.errors import WeightsError
from allears.core.weights import read_sidecar
from allears.turbo.sparse.install import KIND
from allears.turbo.sparse.search import LayerReport

_HEAD = ("layer", "sparsity", "mass kept", "error", "sparse alone", "pooled router", "router", "why dense")


def read_reports(path_stem: str | os.PathLike[str]) -> list[LayerReport]:
    """The report of each layer, in the order in which they ran.

    Args:
        path_stem: NAME of the NAME.json that :func:`sparsify` wrote.

    Raises:
        WeightsError: the file is missing, or of another kind.
    """
    record = read_sidecar(path_stem)
    if record.get("kind") != KIND:
        raise WeightsError(f"weights {str(path_stem)!r}: of kind {record.get('kind')!r}, wanted {KIND!r}")
    layers = record["layers"].values()
    return [
        from_dict(LayerReport, {key: value for key, value in layer.items() if key != "facts"}, "layers")
        for layer in layers
    ]


def summary(report: LayerReport) -> dict[str, Any]:
    """A layer as JSON types: its last trial, which is the one that was taken; of a dense layer that with the least
    error. Without a trial (a mask, a short layer) the numbers are None.
    """
    trial = None
    if report.trials:
        trial = report.trials[-1] if report.keep is not None else min(report.trials, key=lambda trial: trial.error)
    return {
        "layer": report.name,
        "sparse": report.keep is not None,
        "sparsity": report.sparsity,
        "tried_keep": None if trial is None else trial.keep,
        "mass": None if trial is None else trial.mass,
        "error": None if trial is None else trial.error,
        "error_sparse": None if trial is None else trial.error_sparse,
        "error_pooled": None if trial is None else trial.error_pooled,
        "router": None if trial is None else trial.router,
        "reason": report.reason,
        "seconds": report.seconds,
    }


def table(reports: list[LayerReport]) -> str:
    """A line for each layer, and one that sums up: how many are sparse, and how many of their key blocks are not read.

    Errors are relative L2 against dense attention on held-out samples.
    """
    lines = [_HEAD, *(_line(summary(report)) for report in reports)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    sparse = [report for report in reports if report.keep is not None]
    share = sum(report.sparsity for report in sparse) / max(1, len(sparse))
    text.append(f"{len(sparse)} of {len(reports)} layers are sparse, {share:.1%} on average; the others stay dense")
    return "\n".join(text)


def _line(found: dict[str, Any]) -> tuple[str, ...]:
    def number(name: str) -> str:
        return "-" if found[name] is None else f"{found[name]:.3f}"

    at = "" if found["sparse"] or found["tried_keep"] is None else f" (best at keep {found['tried_keep']:g})"
    return (
        found["layer"],
        f"{found['sparsity']:.1%}" if found["sparse"] else "dense",
        *(number(name) for name in ("mass", "error", "error_sparse", "error_pooled")),
        found["router"] or "-",
        found["reason"] + at,
    )
