"""The pre-training study of SageBwd: exact attention against 8-bit attention, arm by arm, in one process.

The arms and what they ask are in ``pretrain_arms.py``. All arms of a seed start from the same weights and see the same
text in the same order.
"""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from allears.core.device import resolve_device
from allears.data.tokens import TokenData, read_tokens
from allears.models.language.config import PRESETS
from allears.ops.attention import LowBit, attention
from allears.recipes.pretrain import load_run, spec_of, train_language
from allears.recipes.pretrain_arms import LARGE, Arm, study_arms
from allears.recipes.pretrain_objective import Windows
from allears.recipes.pretrain_trace import trace_errors
from allears.train import DivergedError, TrainResult

log = logging.getLogger(__name__)

STUDY = "study.json"


def run_study(
    corpus: str,
    out: str,
    minutes: float | None = None,
    arms: Iterable[Arm] | None = None,
    device: str = "auto",
    preset: str = "study",
    tokens_per_step: int = 8192,
    token_budget: int = 8_388_608,
    lr: float = 2e-3,
    trace_windows: int = 4,
    data: TokenData | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train each arm and write ``out/study.json`` after each; ``out/ARM/log.jsonl`` has its curves.

    An arm is trained whole or not at all, since a shorter one could not be compared: one that would end after
    ``minutes``, judged by those before it, is left for the next call, and one that does not end in time is stopped with
    a checkpoint. A later call with the same ``out`` goes on with what is left, within minutes of its own.

    Args:
        corpus: a folder made by :func:`allears.data.text.build_text_corpus`.
        minutes: for this call; ``None`` for no limit. A call in another thread than the main one has no hard limit.
        arms: those of :func:`study_arms` by default.
        tokens_per_step: of the small batch; the large one has eight times as many.
        trace_windows: validation sequences for the trace.
        settings: further arguments of :func:`train_language`, for all arms.

    Returns:
        What ``study.json`` holds: ``settings``, and ``arms``, a row an arm with its ``status``: ``done``, ``diverged``
        (the loss stopped being finite), ``refused`` (no kernel here runs it), ``failed`` (an error of a kernel or the
        device; ``reason`` has the message), ``stopped`` (has a checkpoint) or ``left``. All but the first two are tried
        again by the next call.

    Raises:
        ValueError: ``out`` holds a study with other settings, or a setting is out of its range.
    """
    started = time.monotonic()
    limit_s = 60 * minutes if minutes is not None else None
    where = resolve_device(device)
    arms = list(study_arms() if arms is None else arms)
    data = read_tokens(corpus) if data is None else data
    common: dict[str, Any] = {
        "preset": preset,
        "token_budget": token_budget,
        "lr": lr,
        **settings,
    }
    document = _open(
        Path(out) / STUDY, {**common, "tokens_per_step": tokens_per_step, "corpus_sha256": data.report.sha256}, arms
    )
    took_s: dict[tuple[str, bool], float] = {}
    for arm in arms:
        row = document["arms"][arm.name]
        if row["status"] in ("done", "diverged"):
            if row["status"] == "done":
                took_s[arm.numerics, arm.large] = row["elapsed_s"]
            continue
        left_s = limit_s - (time.monotonic() - started) if limit_s is not None else None
        expected_s = 1.1 * took_s.get((arm.numerics, arm.large), max(took_s.values(), default=0.0))
        if left_s is not None and left_s <= expected_s:
            log.info("%s: left, %.0f s remain and it takes about %.0f s", arm.name, left_s, expected_s)
            continue
        log.info("arm %s", arm.name)
        folder = Path(out) / arm.name
        begun = time.monotonic()
        watch = _alarm(started + limit_s) if limit_s is not None else None
        row.pop("reason", None)
        row |= _train(arm, str(folder), tokens_per_step, where, {**common, "data": data, "watch": watch})
        if row["status"] == "done":
            took_s[arm.numerics, arm.large] = row["elapsed_s"] = round(time.monotonic() - begun, 2)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if arm.trace:
                row["trace"] = _trace(folder, data, where, trace_windows)
        _write(Path(out) / STUDY, document)
        if row["status"] == "stopped":
            break
    return document


def refusal(arm: Arm, head_dim: int, heads: int, device: torch.device) -> str:
    """Why the attention of ``arm`` cannot train here; empty if it can. Runs it once, forward and backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 128, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        attention(q, k, v, spec_of(arm.numerics, arm.smooth_k, arm.smooth_q, arm.grad_scales)).sum().backward()
    except ValueError as error:
        return str(error)
    return ""


def _train(arm: Arm, folder: str, tokens_per_step: int, where: torch.device, more: dict[str, Any]) -> dict[str, Any]:
    """Train one arm: the fields of its row."""
    config = PRESETS[more["preset"]]
    facts = {"device": _device_name(where)}
    if reason := refusal(arm, config.head_dim, config.heads, where):
        log.warning("%s: refused: %s", arm.name, reason)
        return {**facts, "status": "refused", "reason": reason}
    result: TrainResult
    try:
        result = train_language(
            [],
            folder,
            device=where.type,
            seed=arm.seed,
            tokens_per_step=tokens_per_step * (LARGE if arm.large else 1),
            qk_norm=arm.qk_norm,
            init_qk_gain=arm.gain,
            numerics=arm.numerics,
            smooth_k=arm.smooth_k,
            smooth_q=arm.smooth_q,
            grad_scales=arm.grad_scales,
            **more,
        )
    except DivergedError as error:
        log.warning("%s: diverged: %s", arm.name, error)
        return {**facts, "status": "diverged", "reason": str(error)}
    except ValueError:
        raise  # a setting that no arm could be trained with
    except Exception as error:
        log.exception("%s: failed", arm.name)
        return {**facts, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    status = "stopped" if result.stop == "signal" else "done"
    return {**facts, "status": status, "steps": result.step, "skipped": result.skipped, "metrics": result.metrics}


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}"


def _alarm(deadline: float) -> Any:
    """A watcher that asks the loop to stop, as SIGTERM does, once ``deadline`` (monotonic seconds) is over."""
    fired = False

    def watch(step: int) -> None:
        nonlocal fired
        main = threading.current_thread() is threading.main_thread()  # elsewhere the loop does not catch the signal
        if not fired and main and time.monotonic() > deadline:
            fired = True
            signal.raise_signal(signal.SIGTERM)

    return watch


def _trace(folder: Path, data: TokenData, device: torch.device, windows: int) -> list[dict[str, Any]]:
    model = load_run(folder, device)
    tokens = Windows(data.val, model.config.context, 0, device).spread(windows)
    return trace_errors(model, tokens, LowBit())


def _open(path: Path, settings: dict[str, Any], arms: list[Arm]) -> dict[str, Any]:
    """The study in ``path`` with a row for each of ``arms``; a new one if there is none."""
    settings = json.loads(json.dumps(settings))
    document: dict[str, Any] = {"settings": settings, "arms": {}}
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["settings"] != settings:
            differ = sorted(
                name
                for name in {*settings, *document["settings"]}
                if settings.get(name) != document["settings"].get(name)
            )
            raise ValueError(
                f"out: {str(path)!r} holds a study with another {', '.join(differ)}; give another folder, or the same "
                "settings"
            )
    for arm in arms:
        facts = {**asdict(arm), "setting": arm.setting, "system": arm.system, "status": "left"}
        document["arms"].setdefault(arm.name, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, document)
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
