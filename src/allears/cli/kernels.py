"""What attention gets on this machine: the kernel that runs for each kind of numerics, and why each other does not."""

from importlib import import_module
from typing import Any

USES = ("inference", "training")
PROBE = "bfloat16, head size 128, no mask"
"""The call that is asked about: the most common one."""


def numerics_report() -> list[dict[str, Any]]:
    """For each kind of numerics and each use (without and with gradients): the kernel, those that could run too, and
    why the others cannot. Nothing is computed and nothing compiled.

    Returns:
        ``{"numerics", "device", "inference": {"kernel", "able", "refused"}, "training": ...}`` a kind; ``kernel`` is
        ``None`` where none runs, and ``refused`` then says why under the name ``"all"``.
    """
    try:
        kinds = _kinds()
    except Exception as error:  # shown, not raised: the rest of the report is still of use
        nothing = {"kernel": None, "able": [], "refused": {"all": f"{type(error).__name__}: {error}"}}
        return [{"numerics": "attention", "device": "unknown", **dict.fromkeys(USES, nothing)}]
    return [_row(kind) for kind in kinds]


def _kinds() -> tuple[str, ...]:
    from typing import get_args

    return get_args(import_module("allears.ops.attention").Numerics)


def _row(kind: str) -> dict[str, Any]:
    from allears.core.device import resolve_device

    device = resolve_device()
    return {"numerics": kind, "device": device.type, **{use: _choice(kind, use, device) for use in USES}}


def _choice(kind: str, use: str, device: Any) -> dict[str, Any]:
    import torch

    room = import_module("allears.ops.attention")
    q, k, v = (
        torch.empty(1, 256, 2, 128, dtype=torch.bfloat16, device=device, requires_grad=use == "training")
        for _ in range(3)
    )
    try:
        with torch.enable_grad():
            found = room.explain(q, k, v, room.AttentionSpec(numerics=kind))
    except Exception as error:  # ValueError: no kernel runs it; anything else is a fault that the reader must see
        kernels = _reasons(str(error)) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return {"kernel": None, "able": [], "refused": {"all": kernels}}
    return {"kernel": found.kernel, "able": list(found.able), "refused": dict(found.refused)}


def _reasons(message: str) -> str:
    """An error of the attention room without the words that repeat the question."""
    return " ".join(message.split()).removeprefix("attention: ").removeprefix("numerics: ")


def numerics_text(rows: list[dict[str, Any]]) -> list[str]:
    """The report as lines: a kind of numerics a block; inference and training share a line where they get the same."""
    lines = []
    for row in rows:
        uses = [USES] if row["inference"] == row["training"] else [(use,) for use in USES]
        for index, together in enumerate(uses):
            name = row["numerics"] if index == 0 else ""
            lines += _lines(name, " and ".join(together), row[together[0]])
    return lines


def _lines(name: str, use: str, choice: dict[str, Any]) -> list[str]:
    begin = f"  {name:<9} {use}: "
    if choice["kernel"] is None:
        return [f"{begin}none: {choice['refused']['all']}"]
    also = f" (also able: {', '.join(choice['able'])})" if choice["able"] else ""
    return [
        f"{begin}{choice['kernel']}{also}",
        *(f"  {'':<9}   not {kernel}: {reason}" for kernel, reason in choice["refused"].items()),
    ]
