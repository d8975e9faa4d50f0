"""The rows as a table for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_COLUMNS = {
    "total_s": ("total s", "{:.3f}"),
    "step_ms": ("step ms", "{:.1f}"),
    "attention_ms": ("attention ms", "{:.1f}"),
    "linear_ms": ("linear ms", "{:.1f}"),
    "other_ms": ("other ms", "{:.1f}"),
    "ms": ("ms", "{:.3f}"),
    "fwd_bwd_ms": ("fwd+bwd ms", "{:.3f}"),
    "graph_ms": ("graph ms", "{:.3f}"),
    "bandwidth_frac": ("of copy", "{:.0%}"),
    "speedup": ("times faster", "{:.2f}"),
    "graph_speedup": ("by graph", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.0f}"),
    "rel_err": ("error", "{:.4f}"),
    "rel_err_dq": ("dQ", "{:.4f}"),
    "rel_err_dk": ("dK", "{:.4f}"),
    "rel_err_dv": ("dV", "{:.4f}"),
    "peak_gb": ("peak GB", "{:.2f}"),
    "estimate_gb": ("estimated GB", "{:.2f}"),
    "memory_frac": ("memory", "{:.1%}"),
    "extra_memory_frac": ("extra memory", "{:.1%}"),
}


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table a case: a line a system, the fastest first, those without a speed last."""
    return [_table(case, rows) for case in dict.fromkeys(row["case"] for row in rows)]


def _table(case: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    values = {(r["system"], r["metric"]): r["value"] for r in rows if r["case"] == case}
    shown = [metric for metric in _COLUMNS if any(m == metric for _, m in values)]
    table = Table(title=case, title_justify="left")
    table.add_column("system")
    for metric in shown:
        table.add_column(_COLUMNS[metric][0], justify="right")
    systems = dict.fromkeys(system for system, _ in values)
    for system in sorted(systems, key=lambda name: values.get((name, "ms"), float("inf"))):
        cells = [values.get((system, metric)) for metric in shown]
        table.add_row(
            system, *("-" if v is None else _COLUMNS[m][1].format(v) for m, v in zip(shown, cells, strict=True))
        )
    return table
