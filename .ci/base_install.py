"""Imports and runs allears with its base dependencies alone.

A second virtual environment is made beside the development one, and the files of the base dependencies (and of what
they depend on) are linked into it from there. So nothing is downloaded, and every optional package is truly absent.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

SITE = Path(sysconfig.get_path("purelib"))

OPTIONAL = (
    "scipy",
    "matplotlib",
    "librosa",
    "onnxruntime",
    "pesq",
    "pystoi",
    "av",
    "pyroomacoustics",
    "pytest",
    "triton",
    "fastapi",
    "uvicorn",
    "websockets",
    "diffusers",
    "transformers",
)

IMPORT_ALL = """
import importlib, pkgutil, sys
import allears
names = [module.name for module in pkgutil.walk_packages(allears.__path__, "allears.")]
kernels = [name for name in names if name.rpartition(".")[2].startswith("triton_")]
for name in names:
    if name not in kernels:
        importlib.import_module(name)
for name in kernels:  # kernels are functions that Triton decorates: it alone may be missing
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
print(f"{len(names) - len(kernels)} modules import, {len(kernels)} need Triton")
"""

ATTENTION = """
import torch
from allears import AttentionSpec, attention
q, k, v = torch.randn(3, 1, 70, 2, 32).unbind()
exact = attention(q, k, v)
for numerics in ("int8_fp8", "int8_fp16", "sagebwd", "nvfp4"):
    error = (attention(q, k, v, AttentionSpec(numerics=numerics)) - exact).norm() / exact.norm()
    assert error < 0.4, (numerics, error)
"""

ABSENT = """
import importlib.util, sys
present = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
sys.exit(f"optional packages leak into the base install: {present}" if present else 0)
"""

NOISE = """
import sys
import numpy, soundfile
soundfile.write(sys.argv[1], 0.1 * numpy.random.default_rng(0).standard_normal(16000), 16000)
"""


def base_distributions(root: str = "allears") -> dict[str, metadata.Distribution]:
    """The distribution ``root`` and all that it needs on this machine without any extra, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = distribution = metadata.distribution(name)
        for text in distribution.requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                waiting.append((wanted.name.lower().replace("_", "-"), frozenset(wanted.extras)))
    return found


def link(distributions: dict[str, metadata.Distribution], site: Path) -> None:
    """Link every top-level file and folder of the distributions into ``site``."""
    for name, distribution in distributions.items():
        if distribution.files is None:
            raise SystemExit(f"base install: {name} does not list its files; install it with pip")
        for top in {file.parts[0] for file in distribution.files}:
            target = site / top
            if top not in ("..", "__pycache__") and (SITE / top).exists() and not target.exists():
                target.symlink_to(SITE / top)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="allears-base-") as folder:
        place = Path(folder)
        venv.create(place / "venv", with_pip=False, symlinks=os.name != "nt")
        python = place / "venv" / "bin" / "python"
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        base = base_distributions()
        link(base, Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()))
        print(f"base install: {', '.join(sorted(base))}")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        noise, clean = str(place / "noise.wav"), str(place / "clean.wav")
        for arguments in (
            ["-c", ABSENT, *OPTIONAL],
            ["-c", IMPORT_ALL],
            ["-m", "allears", "--help"],
            ["-m", "allears", "doctor"],
            ["-c", ATTENTION],
            ["-c", NOISE, noise],
            ["-m", "allears", "enhance", noise, "-o", clean, "--report"],
        ):
            shown = " ".join(word if "\n" not in word else "..." for word in arguments)
            print(f"base install: python {shown}", flush=True)
            done = subprocess.run([str(python), *arguments], cwd=place, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"base install: failed with status {done.returncode}")
        if not (Path(clean).exists() and (place / "report.html").exists()):
            raise SystemExit("base install: enhance left no output")


if __name__ == "__main__":
    sys.exit(main())
