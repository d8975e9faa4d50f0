"""The inputs of a case and its exact answer on a sample of rows.

Shapes: M rows, K channels in, N out, S rows of the sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allears.bench.gemm.cases import Case

SAMPLE = 256
SPREAD, OUTLIERS, OUTLIER = 0.5, 4, 12.0


@dataclass(frozen=True)
class Inputs:
    """x (M, K) and, for norms, branch (M, K), gate, scale and shift (1, 1, K); the layer; and what is exact: ``rows``
    (S,) of ``exact`` (S, N), float64. All but that in bfloat16, modulation in float32."""

    x: Tensor
    linear: nn.Linear | None
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    rows: Tensor
    exact: Tensor

    def error(self, out: Tensor) -> float:
        """Relative L2 error of an output (M, N) on the sample; NaN where anything of it is not finite."""
        found = out.detach()[self.rows].double()
        if not bool(torch.isfinite(out.sum(dtype=torch.float32))):
            return float("nan")
        return float((found - self.exact).norm() / self.exact.norm())


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Normal numbers, in channels of different sizes: log-normal gains of deviation 0.5, four channels 12 times larger,
    as activations of transformers have them; weights normal, of deviation 1 / sqrt(K)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    with torch.no_grad():
        gains = (SPREAD * normal(case.inner)).exp()
        gains[torch.randperm(case.inner, device=device, generator=generator)[:OUTLIERS]] *= OUTLIER
        x = torch.randn(case.rows, case.inner, device=device, generator=generator, dtype=torch.bfloat16)
        x = x.mul_(gains.bfloat16())
        rows = torch.randperm(case.rows, device=device, generator=generator)[:SAMPLE].sort().values
        if case.kind == "linear":
            linear = nn.Linear(case.inner, case.columns, device=device, dtype=torch.bfloat16)
            linear.weight.copy_(normal(case.columns, case.inner) / case.inner**0.5)
            linear.bias.copy_(normal(case.columns) / 10)
            exact = F.linear(x[rows].double(), linear.weight.double(), linear.bias.double())
            return Inputs(x, linear, None, None, None, None, rows, exact)
        if case.kind == "gelu":
            exact = F.gelu(x[rows].double(), approximate="tanh")
            return Inputs(x, None, None, None, None, None, rows, exact)
        branch = torch.randn(case.rows, case.inner, device=device, generator=generator, dtype=torch.bfloat16)
        gate, scale, shift = (normal(1, 1, case.inner) / 2 for _ in range(3))
        total = (x[rows].double() + branch[rows].double() * gate[0].double()).bfloat16().double()
        exact = F.layer_norm(total, (case.inner,), eps=1e-6) * (1 + scale[0].double()) + shift[0].double()
        return Inputs(x, None, branch, gate, scale, shift, rows, exact)
