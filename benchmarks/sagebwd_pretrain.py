"""The pre-training study of SageBwd: run it (or what is left of it), and make rows and a picture of its logs."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allears.recipes.pretrain_arms import LARGE
from allears.recipes.pretrain_study import STUDY, run_study
from allears.train.logs import read_log

from . import results
from .registry import case

METRICS = ("val_loss", "val_loss_exact", "val_bits_per_byte")
_SCALES = ("row", "tile")


@case("sagebwd_pretrain")
@dataclass
class SageBwdPretrain:
    """Train the arms of the study, then write benchmarks/results/NAME.json and NAME.png."""

    study: Path
    """Folder of the study: its logs are read, and arms that are left are trained into it."""

    corpus: Path | None = None
    """Folder of tokens (allears.data.text); without it nothing is trained."""

    minutes: float | None = None
    """Time for the trainings of this call."""

    lr: float = 2e-3
    """Highest learning rate."""

    token_budget: int = 8_388_608
    """Tokens each arm trains on."""

    name: str = "sagebwd_pretrain"
    """Name of the result files."""

    results_folder: Path = results.RESULTS
    """Folder of the result files."""

    commit: str | None = None
    """The commit that is measured, for a copy of the files without their repository."""

    def run(self) -> int:
        if self.corpus is not None:
            run_study(
                str(self.corpus),
                str(self.study),
                minutes=self.minutes,
                lr=self.lr,
                token_budget=self.token_budget,
            )
        document = read_study(self.study)
        draw(document, self.study, self.results_folder / f"{self.name}.png")
        path = results.write(self.name, study_rows(document), notes(document), self.results_folder, self.commit)
        print(f"written: {path}")
        return 0


def read_study(folder: Path) -> dict[str, Any]:
    """``study.json`` of a folder.

    Raises:
        ValueError: there is none, or no arm of it is done.
    """
    path = folder / STUDY
    if not path.is_file():
        raise ValueError(f"study: {str(folder)!r} holds no {STUDY}; give --corpus to train the arms first")
    document = json.loads(path.read_text(encoding="utf-8"))
    if not _done(document):
        raise ValueError(f"study: no arm of {str(path)!r} is done; give --corpus to train the arms")
    return document


def _done(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [arm for arm in document["arms"].values() if arm["status"] == "done"]


def _trace_of(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """What was traced; before that, or without a result, the field says only whether it is to be."""
    found = arm.get("trace")
    return found if isinstance(found, list) else []


def study_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a result file: losses by setting and system, gaps to exact attention, and the traces.

    A loss is the mean over seeds, with ``_min``, ``_max`` and ``_std`` (of the sample) beside it where there are
    several. A gap is the mean over the seeds that both have, of the difference within a seed.
    """
    by_seed: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(dict)
    for arm in _done(document):
        by_seed[arm["setting"], arm["system"]][arm["seed"]] = arm["metrics"]
    rows: list[dict[str, Any]] = []
    for (setting, system), seeds in by_seed.items():
        for metric in METRICS:
            rows += _summary(setting, system, metric, [found[metric] for found in seeds.values()])
        exact = by_seed.get((setting, "exact"), {})
        for metric in METRICS[:2]:
            gaps = [found[metric] - exact[seed][metric] for seed, found in seeds.items() if seed in exact]
            if system != "exact" and gaps:
                rows += _summary(setting, system, f"{metric}_gap", gaps)
    for arm in document["arms"].values():
        if arm["status"] == "diverged":
            rows.append(results.row(arm["setting"], arm["system"], "diverged", 1.0, n=1))
        for entry in _trace_of(arm):
            rows.append(
                results.row(
                    f"trace {arm['setting']} layer {entry['layer']}",
                    f"sagebwd-{entry['grad_scales']}" if entry["grad_scales"] else "exact",
                    f"{entry['tensor']}_{entry['metric']}",
                    entry["value"],
                )
            )
    return rows


def _summary(setting: str, system: str, metric: str, values: list[float]) -> list[dict[str, Any]]:
    found = {"": statistics.fmean(values)}
    if len(values) > 1:
        found |= {"_min": min(values), "_max": max(values), "_std": statistics.stdev(values)}
    return [results.row(setting, system, f"{metric}{part}", value, n=len(values)) for part, value in found.items()]


def notes(document: dict[str, Any]) -> list[str]:
    """What a reader of the rows must know: settings, and the arms that have no result, with the reason."""
    settings = document["settings"]
    said = [
        f"preset {settings['preset']}, {settings['token_budget']} tokens an arm, {settings['tokens_per_step']} (small) "
        f"or {LARGE * settings['tokens_per_step']} (large) a step, peak learning rate {settings['lr']}",
        "val_loss: nats a token with the attention that trained; val_loss_exact: the same weights with exact attention",
    ]
    said += [f"trained on {device}" for device in dict.fromkeys(arm["device"] for arm in _done(document))]
    for name, arm in document["arms"].items():
        if arm["status"] != "done":
            said.append(f"{name}: {arm['status']}" + (f" ({arm['reason']})" if "reason" in arm else ""))
    return said


def draw(document: dict[str, Any], study: Path, path: Path) -> None:
    """A panel a setting: validation loss over tokens, or the last loss alone where logs are missing; a panel for the
    errors of each traced model. As a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = _done(document)
    settings = list(dict.fromkeys(arm["setting"] for arm in arms))
    traced = [(name, arm) for name, arm in document["arms"].items() if _trace_of(arm)]
    columns = max(len(settings), len(traced), 1)
    figure = Figure(figsize=(4.6 * columns, 7.6 if traced else 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if traced else 1, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, setting in zip(panels[0], settings, strict=False):
        mine = [arm for arm in arms if arm["setting"] == setting]
        kept = all((study / name / "log.jsonl").is_file() for name, arm in document["arms"].items() if arm in mine)
        _draw_losses(panel, mine, document, study) if kept else _draw_last_losses(panel, mine)
        panel.set_title(setting, fontsize=10)
    for panel, (_, arm) in zip(panels[-1] if traced else (), traced, strict=False):
        _draw_trace(panel, _trace_of(arm))
        panel.set_title(f"trace: {arm['setting']}, seed {arm['seed']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


def _draw_losses(panel: Any, arms: list[dict[str, Any]], document: dict[str, Any], study: Path) -> None:
    """The loss of each system's seeds; training as a thin line, validation with marks."""
    panel.set_axis_on()
    systems = list(dict.fromkeys(arm["system"] for arm in arms))
    lowest, curves = [], defaultdict(list)
    for arm in arms:
        name = next(name for name, other in document["arms"].items() if other is arm)
        tokens = document["settings"]["tokens_per_step"] * (LARGE if arm["large"] else 1)
        log = read_log(study / name / "log.jsonl")
        colour, label = f"C{systems.index(arm['system'])}", arm["system"] if arm["seed"] == arms[0]["seed"] else None
        for kind, value, style in (("train", "loss", {"alpha": 0.25}), ("validate", "val_loss", {"marker": "."})):
            points = [(row["step"] * tokens / 1e6, row[value]) for row in log if row["kind"] == kind and row.get(value)]
            panel.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1,
                label=label if kind == "validate" else None,
                **style,
            )
            curves[kind] += [y for x, y in points[len(points) // 4 :]]
        lowest.append(min(curves["validate"]))
    panel.set_ylim(min(lowest) - 0.1, max(max(curves["validate"], default=0.0), min(lowest) + 0.2) + 0.1)
    panel.set_xlabel("tokens, millions")
    panel.set_ylabel("loss, nats a token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def _draw_last_losses(panel: Any, arms: list[dict[str, Any]]) -> None:
    """Where logs were not kept: the last validation loss of each system's seeds."""
    panel.set_axis_on()
    systems = list(dict.fromkeys(arm["system"] for arm in arms))
    for arm in arms:
        row = systems.index(arm["system"])
        panel.plot(arm["metrics"]["val_loss"], row, "o", color=f"C{row}")
    panel.set_yticks(range(len(systems)), [system.replace("sagebwd-", "") for system in systems], fontsize=7)
    panel.set_ylim(-0.6, len(systems) - 0.4)
    panel.set_xlabel("last validation loss, nats a token")
    panel.grid(alpha=0.3)


def _draw_trace(panel: Any, trace: list[dict[str, Any]]) -> None:
    """Relative error of each tensor by layer; full lines with scales a row, dashed with scales a tile."""
    panel.set_axis_on()
    names = list(dict.fromkeys(row["tensor"] for row in trace if row["metric"] == "rel_l2" and row["tensor"] != "dP"))
    for index, name in enumerate(names):
        for scales, style in zip(_SCALES, ("-", "--"), strict=True):
            rows = [r for r in trace if (r["tensor"], r["grad_scales"], r["metric"]) == (name, scales, "rel_l2")]
            panel.plot(
                [row["layer"] for row in rows],
                [row["value"] for row in rows],
                style,
                color=f"C{index}",
                marker=".",
                linewidth=1,
                label=name if scales == "row" else None,
            )
    panel.set_yscale("log")
    panel.set_xlabel("layer")
    panel.set_ylabel("relative error to float32")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=7, ncols=2)
