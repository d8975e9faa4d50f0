"""The separators of one size, with drawn weights, and the check that comes before any speed.

Shapes: B = 1, J outputs, S samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from allears.bench.separate.settings import SIZES
from allears.core.device import matmul_precision
from allears.models.separate.config import PRESETS, Attention
from allears.models.separate.model import SeparateNet

BOUNDS = {"optimised": 1e-3, "fla": 1e-2}
"""Relative L2 errors above which there is no speed: against the published net of equal weights, and of the kernels on a
GPU against the reference on the CPU."""
_SPREAD = 0.02
_CHECK_S = {"sepreformer": 20.0, "locoformer": 4.0}  # 20 s: beyond the farthest relative position
_CPU_CHECK_S = 0.5


def family(size: str) -> str:
    """``sepreformer`` or ``locoformer``."""
    return "locoformer" if PRESETS[SIZES[size]].sepreformer is None else "sepreformer"


def system_name(size: str, attention: str) -> str:
    """As the rows have it."""
    return {"published": family(size), "optimised": f"{family(size)}-optimised"}.get(attention, f"allears-{attention}")


def make_net(size: str, attention: str, device: torch.device, seed: int) -> SeparateNet:
    """A net for inference whose weights are moved from where they start, so that no branch of it is all but zero."""
    config = replace(PRESETS[SIZES[size]], attention=cast(Attention, attention))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SeparateNet(config)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += _SPREAD * torch.randn(parameter.shape)
    return net.to(device).eval().requires_grad_(False)


def make_nets(size: str, attentions: Sequence[str], device: torch.device, seed: int) -> dict[str, SeparateNet]:
    """A net of each attention; published and optimised have equal weights."""
    nets = {attention: make_net(size, attention, device, seed) for attention in attentions}
    if "published" in nets and "optimised" in nets:
        nets["optimised"].load_state_dict(nets["published"].state_dict())
    return nets


def make_mixture(net: SeparateNet, seconds: float, seed: int) -> Tensor:
    """Normal noise (1, S) at the net's rate, on its device."""
    samples = max(1, round(seconds * net.config.sample_rate_hz))
    noise = torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))
    return noise.to(next(net.parameters()).device)


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in ``float32``, ``tf32`` or ``bf16`` (autocast), as it was before on leaving."""
    tf32 = precision == "tf32"
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32)
    with matmul_precision("high" if tf32 else "highest"), convolutions, autocast:
        yield


def check(size: str, nets: dict[str, SeparateNet], device: torch.device, seed: int, quick: bool) -> dict[str, float]:
    """Relative L2 errors by attention, in float32: of ``optimised`` against ``published``, and on a GPU of ``fla``."""
    errors = {}
    with torch.inference_mode(), products("float32", device):
        if "published" in nets and "optimised" in nets:
            seconds = _CHECK_S[family(size)] if device.type == "cuda" and not quick else _CPU_CHECK_S
            mixture = make_mixture(nets["published"], seconds, seed)
            errors["optimised"] = rel_err(nets["optimised"](mixture), nets["published"](mixture))
        if "fla" in nets and device.type == "cuda":
            on_cpu = make_net(size, "fla", torch.device("cpu"), seed)
            mixture = make_mixture(on_cpu, _CPU_CHECK_S, seed)
            errors["fla"] = rel_err(nets["fla"](mixture.to(device)), on_cpu(mixture))
    return errors


def rel_err(out: Tensor, wanted: Tensor) -> float:
    """Relative L2 error; NaN where either is not finite."""
    wanted = wanted.to(out.device)
    return float((out.float() - wanted.float()).norm() / wanted.float().norm())
