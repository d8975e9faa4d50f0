"""Weights as NAME.safetensors (tensors) beside NAME.json (configuration, and the hash that ties the two). No pickle."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from allears.core.config import from_dict
from allears.core.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SHIPPED = Path(__file__).resolve().parents[1] / "weights"

Config = TypeVar("Config")

_HINT = "download or copy both files of the pair again"


def weight_paths(path_stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The pair (NAME.safetensors, NAME.json); ``path_stem`` may also be either path. Dots in NAME are kept."""
    stem = Path(path_stem)
    name = stem.name
    for suffix in (".safetensors", ".json"):
        name = name.removesuffix(suffix)
    return stem.with_name(name + ".safetensors"), stem.with_name(name + ".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_through(path: Path, temporary: Path) -> None:
    """Give the finished file ``temporary`` its name, after its bytes have reached the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def save_weights(
    path_stem: str | os.PathLike[str],
    state_dict: "dict[str, Tensor]",
    config: dict[str, Any],
    dtype: "torch.dtype | str | None" = "float16",
) -> Path:
    """Write ``state_dict`` and ``config`` as NAME.safetensors and NAME.json, each under a temporary name first, so that
    processes which save the same (of one training) do not disturb one another.

    Args:
        path_stem: folder and NAME, without a suffix; the folder is made.
        state_dict: tensors of any shape and device; tensors that share memory are written once each.
        config: JSON types; the keys ``sha256``, ``bytes`` and ``dtype`` are set here, over what came.
        dtype: type that floating tensors are stored in; ``None`` keeps each one's own. Others are kept as they are.

    Returns:
        The path of the safetensors file.

    Raises:
        WeightsError: a finite value does not fit ``dtype``.
        TypeError: ``config`` is not made of JSON types.
    """
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tensors = {}
    for name, value in state_dict.items():
        stored = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if kind is not None and stored.is_floating_point():
            cast = stored.to(kind)
            if not torch.equal(torch.isfinite(cast), torch.isfinite(stored)):
                raise WeightsError(
                    f"state_dict[{name!r}]: a value of size {float(stored.abs().max()):.3g} does not fit {kind}; "
                    "store it with dtype=torch.float32"
                )
            stored = cast
        tensors[name] = stored
    json.dumps(config)  # a config that JSON cannot hold fails before anything is written
    weights, sidecar = weight_paths(path_stem)
    weights.parent.mkdir(parents=True, exist_ok=True)
    parts = (path.with_name(f".{path.name}.{os.getpid()}.part") for path in (weights, sidecar))  # of this process
    part_weights, part_sidecar = parts
    try:
        save_file(tensors, part_weights)
        record = {
            **config,
            "dtype": str(kind).removeprefix("torch.") if kind is not None else "as given",
            "bytes": part_weights.stat().st_size,
            "sha256": _sha256(part_weights),
        }
        part_sidecar.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _write_through(weights, part_weights)
        _write_through(sidecar, part_sidecar)
    finally:
        part_weights.unlink(missing_ok=True)
        part_sidecar.unlink(missing_ok=True)
    return weights


def read_sidecar(path_stem: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON beside the weights, without reading the tensors.

    Raises:
        WeightsError: NAME.json is missing or is not a JSON object.
    """
    _, sidecar = weight_paths(path_stem)
    if not sidecar.is_file():
        raise WeightsError(f"weights {str(sidecar)!r}: no such file; NAME.json must stand beside NAME.safetensors")
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"weights {str(sidecar)!r}: not JSON ({error}); {_HINT}") from error
    if not isinstance(record, dict):
        raise WeightsError(f"weights {str(sidecar)!r}: expected a JSON object, got {type(record).__name__}; {_HINT}")
    return record


def load_weights(
    path_stem: str | os.PathLike[str], dtype: "torch.dtype | str | None" = "float32"
) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Read what :func:`save_weights` wrote: tensors on the CPU, floating ones as ``dtype`` (``None``: as stored).

    Returns:
        The tensors by name, and the JSON object.

    Raises:
        WeightsError: a file is missing, cut short or corrupt, or the two files do not belong together.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, _ = weight_paths(path_stem)
    if not weights.is_file():
        raise WeightsError(
            f"weights {str(weights)!r}: no such file; give the path of NAME.safetensors without its suffix"
        )
    record = read_sidecar(path_stem)
    if not isinstance(record.get("sha256"), str):
        raise WeightsError(f"weights {str(weights)!r}: its JSON records no 'sha256'; {_HINT}")
    size, expected = weights.stat().st_size, record.get("bytes")
    if isinstance(expected, int) and size != expected:
        raise WeightsError(f"weights {str(weights)!r}: {size} bytes where {expected} were written; {_HINT}")
    if (found := _sha256(weights)) != record["sha256"]:
        raise WeightsError(
            f"weights {str(weights)!r}: sha256 is {found[:12]}..., its JSON says {record['sha256'][:12]}...: "
            f"corrupt, or the two files are of different runs; {_HINT}"
        )
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"weights {str(weights)!r}: not a readable safetensors file ({error}); {_HINT}") from error
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if kind is not None:
        tensors = {name: value.to(kind) if value.is_floating_point() else value for name, value in tensors.items()}
    return tensors, record


def check_keys(model: "nn.Module", state_dict: "dict[str, Tensor]") -> None:
    """Check that ``state_dict`` has the model's names and shapes, no more and no less.

    Raises:
        WeightsError: names are missing or unknown, or shapes differ; the first few are listed.
    """
    wanted = model.state_dict()
    faults = []
    for what, names in (
        ("missing", [name for name in wanted if name not in state_dict]),
        ("unknown", [name for name in state_dict if name not in wanted]),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{what} {', '.join(names[:3])}{rest}")
    shapes = [
        f"{name} is {tuple(state_dict[name].shape)}, wanted {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state_dict and state_dict[name].shape != value.shape
    ]
    if shapes:
        faults.append(
            "wrong shape: " + "; ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        )
    if faults:
        raise WeightsError(
            f"state_dict does not fit {type(model).__name__}: {'; '.join(faults)}; "
            "build the model from the configuration stored with the weights"
        )


def find_weights(name_or_folder: str | os.PathLike[str], model: str) -> Path:
    """The path stem of shipped weights by their name, or of your own by folder (``weights.*`` in it), stem or file.

    Raises:
        WeightsError: nothing is found there; the shipped names that begin with ``model`` are listed.
    """
    given = Path(name_or_folder)
    stems = [given / "weights"]
    if given.name:  # "." and "/" have none
        stems += [weight_paths(given)[0].with_suffix(""), SHIPPED / given]
    for stem in stems:
        if any(path.is_file() for path in weight_paths(stem)):
            return stem
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob(f"{model}*.json"))) or "none"
    raise WeightsError(
        f"model: {str(name_or_folder)!r} is neither shipped weights ({shipped}) nor a folder with weights.safetensors"
    )


@dataclass(frozen=True)
class Pretrained(Generic[Config]):
    """Weights that were found: their name, configuration, tensors, and the whole JSON object."""

    name: str
    config: Config
    tensors: "dict[str, Tensor]"
    record: dict[str, Any]


def load_pretrained(name_or_folder: str | os.PathLike[str], model: str, kind: type[Config]) -> Pretrained[Config]:
    """Find and read the weights of a ``model`` whose configuration is a dataclass ``kind``; floating ones as float32.

    Raises:
        WeightsError: nothing is found there, or it is corrupt or of another model.
    """
    stem = find_weights(name_or_folder, model)
    tensors, record = load_weights(stem)
    if record.get("model") != model:
        raise WeightsError(
            f"weights {str(stem)!r}: made for model {record.get('model')!r}, wanted {model!r}; choose another file"
        )
    try:
        config = from_dict(kind, record.get("config"), "config")
    except ValueError as error:
        raise WeightsError(f"weights {f'{stem}.json'!r}: {error}") from error
    return Pretrained(stem.name, config, tensors, record)
