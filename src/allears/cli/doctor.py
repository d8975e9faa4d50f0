"""``allears doctor``: what this machine has, which kernels and models can run on it, and why the others cannot."""

import importlib.util
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from allears import __version__
from allears.cli.kernels import PROBE, families_report, numerics_report, numerics_text

EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("training recipes: curves, room simulation", ("tensorboard", "matplotlib", "pyroomacoustics")),
    "eval": ("scores: PESQ, ESTOI, DNSMOS", ("pesq", "pystoi", "speechmos", "onnxruntime", "librosa", "scipy")),
    "media": ("any container or codec that FFmpeg reads", ("av",)),
    "onnx": ("separation networks as ONNX files", ("onnx", "onnxruntime")),
    "serve": ("the server of live streams", ("fastapi", "uvicorn", "websockets")),
    "text": ("text corpora: the tokenizer", ("tokenizers",)),
    "gpu": ("attention and matrix kernels on a CUDA GPU", ("triton",)),
    "hub": ("transformers and diffusers models on our attention", ("transformers", "diffusers")),
    "dev": (
        "the project's own tests and checks",
        ("pytest", "xdist", "hypothesis", "ruff", "importlinter", "pyrefly", "onnx", "triton", "nvidia"),
    ),
}
"""Every optional extra: what it unlocks, and the modules it brings."""

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


@dataclass
class Doctor:
    """Show what this machine has, which kernels and models can run on it, and why the others cannot."""

    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> int:
        report = examine()
        print(json.dumps(report, indent=2) if self.json else to_text(report))
        return 0


COMMAND = Doctor


def examine() -> dict[str, Any]:
    """Everything that the verb shows, as JSON types."""
    return {
        "allears": __version__,
        "machine": machine(),
        "torch": torch_state(),
        "audio": audio_formats(),
        "extras": extras(),
        "attention": attention_backends(),
        "numerics": numerics_report(),
        "families": families_report(),
        "models": models(),
    }


def machine() -> dict[str, Any]:
    """System, Python, CPU cores that this process may use, and memory in GiB (``None`` where it is not told)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        memory = None
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "executable": sys.executable,
        "cpu_cores": cores,
        "memory_gib": None if memory is None else round(memory, 1),
    }


def torch_state() -> dict[str, Any]:
    """The torch build, its GPUs with their compute capability, and triton."""
    try:
        torch = import_module("torch")
    except Exception as error:  # a broken build fails in many ways; the doctor's job is to say so
        return {"version": None, "problem": f"torch does not import: {error}"}
    gpus, problem = [], ""
    if not torch.cuda.is_available():
        problem = "no CUDA GPU answers" if torch.version.cuda else "this torch is a CPU build"
    for index in range(torch.cuda.device_count() if not problem else 0):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "compute_capability": f"{found.major}.{found.minor}",
                "memory_gib": round(found.total_memory / 2**30, 1),
            }
        )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "problem": problem,
        "triton": _version("triton"),
    }


def audio_formats() -> dict[str, Any]:
    """The containers that the installed libsndfile reads and writes."""
    try:
        soundfile = import_module("soundfile")
    except Exception as error:  # ImportError, or OSError where the shared library is missing
        return {"libsndfile": None, "formats": [], "problem": f"soundfile does not import: {error}"}
    return {
        "libsndfile": str(soundfile.__libsndfile_version__),
        "formats": sorted(name.lower() for name in soundfile.available_formats()),
        "problem": "",
    }


def extras() -> list[dict[str, Any]]:
    """Each optional extra: what it unlocks, and which of its modules are missing."""
    rows = []
    for name, (unlocks, modules) in EXTRAS.items():
        missing = [module for module in modules if not _installed(module)]
        rows.append({"name": name, "unlocks": unlocks, "installed": not missing, "missing": missing})
    return rows


def attention_backends() -> list[dict[str, Any]]:
    """Each attention kernel: whether it can run here, and if not, why."""
    try:
        found = import_module("allears.ops.attention").backends()
    except Exception as error:  # shown, not raised: the rest of the report is still of use
        return [{"name": "attention", "available": False, "reason": f"{type(error).__name__}: {error}"}]
    return [{"name": b.name, "available": bool(b.available), "reason": b.reason or ""} for b in found]


def models(folder: Path = WEIGHTS) -> list[dict[str, Any]]:
    """Each shipped model: size, and whether its weights are the ones that its card names."""
    return [_model(card) for card in sorted(folder.glob("*.json"))]


def _model(card: Path) -> dict[str, Any]:
    from allears.core.weights import load_weights, weight_paths

    row: dict[str, Any] = {"name": card.stem, "parameters": None, "mib": None, "ok": False, "reason": ""}
    try:
        row["mib"] = round(weight_paths(card)[0].stat().st_size / 2**20, 2)
        tensors, _ = load_weights(card, dtype=None)
    except Exception as error:  # whatever is wrong with one checkpoint is what the reader wants to know
        return {**row, "reason": " ".join(str(error).split())}
    return {**row, "parameters": sum(tensor.numel() for tensor in tensors.values()), "ok": True}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def to_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    here, torch, audio = report["machine"], report["torch"], report["audio"]
    memory = "unknown memory" if here["memory_gib"] is None else f"{here['memory_gib']} GiB memory"
    lines = [
        f"allears {report['allears']}",
        "",
        "machine",
        f"  {here['system']}, {here['cpu_cores']} CPU cores, {memory}",
        f"  Python {here['python']} ({here['executable']})",
    ]
    if torch["version"]:
        lines.append(
            f"  torch {torch['version']}, {torch['threads']} threads, triton {torch['triton'] or 'not installed'}"
        )
        lines += [
            f"  GPU {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
            for gpu in torch["gpus"]
        ]
        lines += [f"  no GPU: {torch['problem']}"] if torch["problem"] else []
    else:
        lines.append(f"  {torch['problem']}")
    if audio["problem"]:
        lines += ["", "audio files", f"  {audio['problem']}"]
    else:
        lines += ["", "audio files", f"  libsndfile {audio['libsndfile']}: {', '.join(audio['formats'])}"]
    lines += ["", "extras"]
    for extra in report["extras"]:
        state = f"; missing {', '.join(extra['missing'])}: pip install 'allears[{extra['name']}]'"
        state = "" if extra["installed"] else state
        lines.append(f"  {_mark(extra['installed'])} {extra['name']:<6} {extra['unlocks']}{state}")
    lines += ["", "attention kernels"]
    for kernel in report["attention"]:
        why = f": {kernel['reason']}" if kernel["reason"] else ""
        lines.append(f"  {_mark(kernel['available'])} {kernel['name']}{why}")
    numerics = report["numerics"]
    lines += ["", f"attention by numerics ({numerics[0]['device']}, {PROBE})", *numerics_text(numerics)]
    families = report["families"]
    lines += ["", f"sparse and linear attention ({families[0]['device']}, {PROBE})", *numerics_text(families, "family")]
    lines += ["", "models"]
    for model in report["models"]:
        good = f"{(model['parameters'] or 0) / 1e6:.2f} M parameters, {model['mib']} MiB, weights verified"
        lines.append(f"  {_mark(model['ok'])} {model['name']}: {good if model['ok'] else model['reason']}")
    if not report["models"]:
        lines.append(f"  none shipped in {WEIGHTS}")
    return "\n".join(lines)


def _mark(good: bool) -> str:
    return "yes" if good else "no "
