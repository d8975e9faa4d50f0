"""What attention gets on this machine: the kernel that runs for each kind of numerics, and why each other does not."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

Ask = Callable[[Any, Any, Any], Any]
"""(q, k, v) to the :class:`Choice` of a kernel."""

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
    room = import_module("allears.ops.attention")
    row: dict[str, Any] = {
        "numerics": kind,
        **_uses(lambda q, k, v: room.explain(q, k, v, room.AttentionSpec(numerics=kind))),
    }
    training = row["training"]
    if training["kernel"] is None:
        how = room.LowBit(backward="drop_in")
        found = _choice(lambda *x: room.explain(*x, room.AttentionSpec(numerics=kind, lowbit=how)), "training")
        if found["kernel"] is not None:
            training["with_backward"] = found["kernel"]
    return row


def families_report() -> list[dict[str, Any]]:
    """The same for sparse-linear attention (SLA2), training-free sparse attention and linear attention.

    Returns:
        ``{"family", "device", "inference", "training"}`` each, as in :func:`numerics_report`.
    """
    try:
        asks = _families()
    except Exception as error:  # as above
        nothing = {"kernel": None, "able": [], "refused": {"all": f"{type(error).__name__}: {error}"}}
        return [{"family": "sparse and linear", "device": "unknown", **dict.fromkeys(USES, nothing)}]
    return [{"family": name, **_uses(ask)} for name, ask in asks.items()]


def _families() -> dict[str, Ask]:
    room = import_module("allears.ops.attention")
    sparse = import_module("allears.ops.attention.sparse_linear.call")
    linear = import_module("allears.ops.attention.linear.call")

    def learned(precision: str) -> Ask:
        options = sparse.SparseLinear(precision=precision)
        return lambda q, k, v: sparse.explain_choice(
            sparse.gather_facts(q, k, v, None, False, False, False), options, "auto"
        )

    def free(precision: str) -> Ask:
        spec = room.AttentionSpec(numerics=precision, sparse=room.Sparsity(keep=0.1))
        return lambda q, k, v: room.explain(q, k, v, spec)

    kinds = {"sparse-linear": learned, "sparse, no training": free}
    asks = {f"{name}, {kind}": of(kind) for name, of in kinds.items() for kind in ("exact", "int8_fp8")}
    return {**asks, "linear": linear.explain_linear}


def _uses(ask: Ask) -> dict[str, Any]:
    from allears.core.device import resolve_device

    return {"device": resolve_device().type, **{use: _choice(ask, use) for use in USES}}


def _choice(ask: Ask, use: str) -> dict[str, Any]:
    import torch

    from allears.core.device import resolve_device

    device = resolve_device()
    q, k, v = (
        torch.empty(1, 256, 2, 128, dtype=torch.bfloat16, device=device, requires_grad=use == "training")
        for _ in range(3)
    )
    try:
        with torch.enable_grad():
            found = ask(q, k, v)
    except Exception as error:  # ValueError: no kernel runs it; anything else is a fault that the reader must see
        kernels = _reasons(str(error)) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return {"kernel": None, "able": [], "refused": {"all": kernels}}
    return {"kernel": found.kernel, "able": list(found.able), "refused": dict(found.refused)}


def _reasons(message: str) -> str:
    """An error of the attention room without the words that repeat the question."""
    return " ".join(message.split()).removeprefix("attention: ").removeprefix("numerics: ")


def numerics_text(rows: list[dict[str, Any]], key: str = "numerics") -> list[str]:
    """The report as lines: a kind of numerics, or a family, a block; inference and training share a line where they get
    the same.
    """
    lines, width = [], max(9, *(len(row[key]) for row in rows))
    for row in rows:
        uses = [USES] if row["inference"] == row["training"] else [(use,) for use in USES]
        for index, together in enumerate(uses):
            name = row[key] if index == 0 else ""
            lines += _lines(f"{name:<{width}}", " and ".join(together), row[together[0]])
    return lines


def _lines(name: str, use: str, choice: dict[str, Any]) -> list[str]:
    begin, below = f"  {name} {use}: ", f"  {'':<{len(name)}}   "
    if choice["kernel"] is None:
        lines = [f"{begin}none: {choice['refused']['all']}"]
        if "with_backward" in choice:
            lines.append(f"{below}with lowbit=LowBit(backward='drop_in') or 'matched': {choice['with_backward']}")
        return lines
    also = f" (also able: {', '.join(choice['able'])})" if choice["able"] else ""
    return [
        f"{begin}{choice['kernel']}{also}",
        *(f"{below}not {kernel}: {reason}" for kernel, reason in choice["refused"].items()),
    ]
