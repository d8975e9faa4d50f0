"""Wan transformers from a folder, in the layout of ``diffusers``, of the original release, or of TurboDiffusion.

Safetensors alone: pickled files (``.pth``, ``.pt``, ``.bin``, ``.ckpt``) are refused, with the way to convert them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allears.core.errors import WeightsError, require
from allears.core.weights import check_keys
from allears.turbo.wan.names import Layout, convert, find_layout, shape_of, strip
from allears.turbo.wan.shapes import WanShape

EXPERTS = ("high_noise_model", "low_noise_model")  # folders of Wan 2.2; diffusers: transformer and transformer_2

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_CONVERT = (
    'convert it once, where you trust its source:  python -c "import torch, sys; from safetensors.torch import '
    "save_file; s = torch.load(sys.argv[1], map_location='cpu', weights_only=True); s = s.get('state_dict', s); "
    'save_file({k: v.contiguous() for k, v in s.items()}, sys.argv[2])" {old} {new}'
)


@dataclass(frozen=True)
class LoadedWan:
    """A transformer that was read from files.

    Args:
        model: diffusers' ``WanTransformer3DModel``, in evaluation mode.
        shape: its sizes.
        layout: in which it was stored.
        projections: of SLA's linear branch by layer, where the checkpoint has them (TurboDiffusion): see
            :func:`allears.turbo.sla_cores`.
        from_int8: how many of its linear layers were stored in INT8, and are bfloat16 now.
    """

    model: Any
    shape: WanShape
    layout: Layout
    projections: dict[str, dict[str, Tensor]]
    from_int8: int


def load_wan(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> LoadedWan:
    """Read one transformer.

    Args:
        path: a safetensors file, or a folder of the files of one transformer, with a ``config.json`` or without.
        dtype: of the weights; those that diffusers keeps in float32 stay so.
        device: where the model goes.

    Raises:
        WeightsError: nothing is there, it is pickled, it is a whole pipeline or a pair of experts, or it does not fit.
        MissingDependencyError: diffusers is not installed.
    """
    files, config = _find(Path(path))
    tensors = _read(files)
    layout = find_layout(tensors)
    if layout == "diffusers":
        state, projections, from_int8 = {strip(name): value for name, value in tensors.items()}, {}, 0
    else:
        converted = convert(tensors)
        state, projections, from_int8 = converted.state, converted.projections, converted.from_int8
    if "num_attention_heads" in config:
        shape = WanShape.from_diffusers({**_DEFAULTS, **config})
    else:
        shape = shape_of(state, config.get("num_heads"), config.get("eps", 1e-6))
    model = build_wan(shape)
    wanted = model.state_dict()
    state = {name: value for name, value in state.items() if name in wanted or "norm_added_q" not in name}
    check_keys(model, state)
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = value.to(torch.float32 if keeps_float32(model, name) else dtype)
    model.load_state_dict(state, assign=True)
    fill_buffers(model)
    return LoadedWan(model.to(device).eval().requires_grad_(False), shape, layout, projections, from_int8)


def load_experts(folder: str | os.PathLike[str], **options: Any) -> dict[str, LoadedWan]:
    """Read the transformers of a pipeline: ``transformer`` alone, or with ``transformer_2``, the low-noise expert.

    Args:
        folder: of a diffusers pipeline (``transformer/``, ``transformer_2/``), of Wan 2.2 (``high_noise_model/``,
            ``low_noise_model/``), or of one transformer.
        options: see :func:`load_wan`.

    Raises:
        WeightsError: see :func:`load_wan`.
    """
    root = Path(folder)
    for first, second in (("transformer", "transformer_2"), EXPERTS):
        if (root / first).is_dir():
            found = {"transformer": load_wan(root / first, **options)}
            if (root / second).is_dir():
                found["transformer_2"] = load_wan(root / second, **options)
            return found
    return {"transformer": load_wan(root, **options)}


def build_wan(shape: WanShape) -> Any:
    """An empty transformer of diffusers on the meta device."""
    diffusers = require("diffusers", "hub", "building a Wan transformer")
    with torch.device("meta"):
        return diffusers.WanTransformer3DModel(**shape.to_diffusers())


_DEFAULTS: dict[str, Any] = {  # of diffusers, for fields that a config.json may leave out
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def _find(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files of a transformer and its configuration, which may be empty."""
    if path.is_file():
        if path.suffix in _PICKLES:
            raise WeightsError(_refusal(path))
        return [path], _config(path.parent)
    if not path.is_dir():
        raise WeightsError(f"path: {str(path)!r} is neither a file nor a folder; give a safetensors file or a folder")
    files = sorted(path.glob("*.safetensors"))
    if files:
        index = path / "diffusion_pytorch_model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            if missing := sorted(name for name in names if not (path / name).is_file()):
                raise WeightsError(f"path: {str(path)!r} lacks {missing[0]!r} of its index; download it again")
            files = [path / name for name in sorted(names)]
        elif len(files) > 1:
            raise WeightsError(
                f"path: {len(files)} safetensors files in {str(path)!r} and no index; give the file that you mean"
            )
        return files, _config(path)
    if any((path / name).is_dir() for name in ("transformer", *EXPERTS)):
        raise WeightsError(f"path: {str(path)!r} is a whole pipeline; use load_experts, or give one of its folders")
    if pickles := sorted(file for file in path.iterdir() if file.suffix in _PICKLES):
        raise WeightsError(_refusal(pickles[0]))
    raise WeightsError(f"path: no safetensors file in {str(path)!r}; give the folder of a transformer")


def _refusal(path: Path) -> str:
    how = _CONVERT.replace("{old}", path.name).replace("{new}", path.with_suffix(".safetensors").name)
    return f"path: {path.name!r} is a pickle, and no pickle is loaded here; {how}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"path: {str(path)!r} is not JSON ({error}); download it again") from error


def _read(files: list[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, ValueError, OSError) as error:
            raise WeightsError(f"path: {file.name!r} is not a readable safetensors file ({error})") from error
    return tensors


def keeps_float32(model: Any, name: str) -> bool:
    """Whether diffusers keeps the weight of this name in float32, whatever the model's dtype."""
    return any(part in name.split(".") for part in getattr(model, "_keep_in_fp32_modules", None) or ())


def fill_buffers(model: Any) -> None:
    """The rotary tables, which are not stored: those of a module made on the CPU."""
    rope = model.rope
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
