"""One video model of what was tuned apart: sparse attention and few steps, by the differences of their weights.

W = W_distilled + (W_sparse - W_teacher), as TurboDiffusion merges (arXiv 2512.16093); the routers and ratios of sparse
layers, which the teacher has not, are copied.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from allears.core.config import to_dict
from allears.core.weights import Pretrained, load_pretrained, save_weights, weight_paths
from allears.diffusion.merge import merge_deltas
from allears.models.video.build import SparseLayers, pack, unpack
from allears.models.video.config import VideoConfig

LARGEST_BYTES = 12 * 2**20
"""Of a shipped file of weights."""
PACKED = ("time_blocks",)
"""Linear layers stored in 8 bits, which makes room for the routers."""

Weights = Pretrained[VideoConfig]


def load_stem(stem: str | Path) -> Weights:
    """Weights of a video model.

    Raises:
        WeightsError: nothing is found there, or it is corrupt or of another model.
    """
    found = load_pretrained(stem, "video", VideoConfig)
    return Pretrained(found.name, found.config, unpack(found.tensors), found.record)


def merged(teacher: Weights, tuned: Weights, distilled: Weights, weight: float = 1.0) -> dict[str, Tensor]:
    """Weights of the distilled model with the sparse layers of the tuned one.

    Args:
        teacher: what both were made of.
        tuned: the teacher with sparse attention; or dense and tuned for something else.
        weight: of the tuned model's difference.

    Raises:
        ValueError: the models are of different sizes, or ``distilled`` is not distilled.
    """
    if not distilled.config.distilled:
        raise ValueError(f"distilled: {distilled.name!r} was not distilled to few steps; give what distil_video left")
    for name, found in (("tuned", tuned), ("distilled", distilled)):
        if _bare(found.config) != _bare(teacher.config):
            raise ValueError(f"{name}: {found.name!r} is of another size than the teacher {teacher.name!r}")
    return merge_deltas(teacher.tensors, [distilled.tensors, tuned.tensors], [1.0, weight])


def merge_video(
    teacher: str | Path,
    tuned: str | Path,
    distilled: str | Path,
    out: str | Path,
    weight: float = 1.0,
    packed: Collection[str] = PACKED,
    largest_bytes: int = LARGEST_BYTES,
) -> Path:
    """Merge weights at path stems and write them at ``out`` in float16, for
    :class:`allears.models.video.VideoGenerator`.

    Args:
        teacher, tuned, distilled, weight: see :func:`merged`.
        packed: linear layers stored in 8 bits (:func:`allears.models.video.build.pack`), so that the file with its
            routers is no larger than one without.
        largest_bytes: of the file.

    Raises:
        ValueError: the models do not fit one another, or the file is too large; then nothing is left.
        WeightsError: a file is missing or corrupt.
    """
    base, sparse, few = (load_stem(stem) for stem in (teacher, tuned, distilled))
    state = pack(merged(base, sparse, few, weight), packed)
    layers = SparseLayers.of_record(sparse.record)
    record = {
        "model": "video",
        "config": to_dict(few.config),
        "sparse": None if layers is None else layers.to_record(),
        "packed": list(packed),
        "training": {
            "recipe": "video_merge",
            "weight": weight,
            "teacher": base.record.get("training"),
            "tuned": sparse.record.get("training"),
            "distilled": few.record.get("training"),
        },
    }
    return _write(out, state, record, largest_bytes)


def pack_video(
    stem: str | Path, out: str | Path, packed: Collection[str] = PACKED, largest_bytes: int = LARGEST_BYTES
) -> Path:
    """Weights at a path stem, such as a distilled model's tuned with sparse attention, in a file small enough to ship.

    Args:
        packed, largest_bytes: see :func:`merge_video`.

    Raises:
        ValueError: the file is too large; then nothing is left.
        WeightsError: a file is missing or corrupt.
    """
    found = load_stem(stem)
    return _write(out, pack(found.tensors, packed), {**found.record, "packed": list(packed)}, largest_bytes)


def _write(out: str | Path, state: dict[str, Tensor], record: dict[str, Any], largest_bytes: int) -> Path:
    path = save_weights(out, state, record)
    size = path.stat().st_size
    if size > largest_bytes:
        for part in weight_paths(out):
            part.unlink()
        raise ValueError(f"packed: the file would have {size} bytes, wanted at most {largest_bytes}; pack more layers")
    return path


def _bare(config: VideoConfig) -> VideoConfig:
    """Without what concerns the sampler alone."""
    return replace(config, distilled=False, steps=50, guidance=1.0, shift=1.0)
