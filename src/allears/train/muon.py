"""Muon for the matrices of a network, AdamW for the rest.

Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024): the averaged gradient of a matrix
is brought to singular values of about one by a Newton-Schulz iteration, so that every direction of it moves alike.
Updates are scaled to the size that AdamW's have (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2),
so both take the same learning rate and decay.

Shapes: N matrices of one shape, P rows, Q columns.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_AS_ADAMW = 0.2
_LEAST_SIDE = 16


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon is meant for it: 16 or more rows and columns, the axes after the first taken together (a convolution
    is the matrix that multiplies its unfolded input; one channel by channel is none)."""
    if parameter.ndim < 2 or (parameter.ndim > 2 and parameter.shape[1] == 1):
        return False
    return min(parameter.shape[0], parameter[0].numel()) >= _LEAST_SIDE


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices (N, P, Q) with their singular values brought to between about 0.7 and 1.2; bfloat16 within."""
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).bfloat16()
    y = y / torch.linalg.matrix_norm(y.float(), keepdim=True).clamp_min(1e-7).bfloat16()
    for _ in range(_ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if wide else y.mT).to(x.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Groups with ``"muon": True`` by Muon, the others by AdamW.

    Like the fused AdamW it leaves weights and averages alone where ``found_inf`` is 1, without waiting for the device.

    Args:
        groups: of matrices (:func:`is_matrix`) where ``muon`` is set, of anything elsewhere; each with its
            ``weight_decay``.
        lr: of both.
        betas: AdamW's.
        momentum: share of Muon's average that a step keeps.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        momentum: float = 0.95,
    ) -> None:
        super().__init__([{"muon": False, **group} for group in groups], {"lr": lr, "weight_decay": 0.0})
        self.momentum = momentum
        rest = [group for group in self.param_groups if not group["muon"]]
        plain = [{k: group[k] for k in ("params", "weight_decay")} for group in rest]
        self.adamw = torch.optim.AdamW(plain, lr, betas, fused=True) if rest else None
        if self.adamw is not None:
            self.adamw.state = self.state  # one state, for the checkpoint

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        bad = self.found_inf
        if self.adamw is not None:
            rest = (group for group in self.param_groups if not group["muon"])
            for group, own in zip(self.adamw.param_groups, rest, strict=True):
                group["lr"] = own["lr"]
            self.adamw.grad_scale, self.adamw.found_inf = None, bad  # type: ignore[attr-defined]
            self.adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._matrices(group, bad)

    def _matrices(self, group: dict[str, Any], bad: Tensor | None) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
        for shape, parameters in alike.items():
            self._update(shape, parameters, group["lr"], group["weight_decay"], bad)

    def _update(
        self, shape: tuple[int, int], parameters: Sequence[Tensor], lr: float, decay: float, bad: Tensor | None
    ) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["momentum"] for parameter in parameters]
        gradient = torch.stack([p.grad.reshape(shape) for p in parameters if p.grad is not None]).float()
        before = torch.stack([average.reshape(shape) for average in averages])
        average = before.lerp(gradient, 1 - self.momentum)
        step = orthogonalised(gradient.lerp(average, self.momentum)) * (lr * _AS_ADAMW * math.sqrt(max(shape)))
        weights = torch.stack([parameter.reshape(shape) for parameter in parameters])
        step = step + lr * decay * weights
        if bad is not None:
            average = torch.where(bad > 0, before, average)
            step = torch.where(bad > 0, torch.zeros_like(step), step)
        for parameter, own, change, mean in zip(parameters, averages, step, average, strict=True):
            parameter.sub_(change.view(parameter.shape))
            own.copy_(mean.view(own.shape))


def matrices(model: nn.Module, leave_out: Sequence[str] = ()) -> list[nn.Parameter]:
    """The parameters of ``model`` that Muon is meant for, but those whose names contain a text of ``leave_out``."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and is_matrix(parameter) and not any(text in name for text in leave_out)
    ]
