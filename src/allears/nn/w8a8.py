"""A linear layer with 8-bit weights, made from a trained one, whose inputs are quantised as they come (W8A8).

Shapes: ... leading sizes, K channels in, N channels out, KP = K rounded up to 16.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from allears.ops.gemm.call import quantise, w8a8_linear
from allears.ops.gemm.schemes import Quantised, SchemeName, padded_columns, scheme_of


class W8A8Linear(nn.Module):
    """``nn.Linear`` for inference in 8 bits: weights rounded once, inputs at each call.

    Casts of the module (``.to(torch.float16)``, ``.half()``) leave values and scales as they are; only the bias takes
    part. The state dict holds ``values``, ``scale`` and ``bias``, and loads into a module of the same scheme and sizes.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        scheme: a name in :data:`~allears.ops.gemm.schemes.SCHEMES`.
        device, dtype: as of ``nn.Linear``; the dtype is that of the bias.

    Attributes:
        kernel: of the product, ``"auto"`` unless set; see :func:`~allears.ops.gemm.call.w8a8_linear`.
    """

    values: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: SchemeName = "fp8_row",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = scheme_of(scheme)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features, out_features: {in_features}, {out_features} given; both must be positive")
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.kernel = "auto"
        width, shape = padded_columns(in_features), kind.scale_shape(out_features, in_features)
        self.register_buffer("values", torch.zeros(out_features, width, device=device).to(kind.dtype))
        self.register_buffer("scale", torch.zeros(shape, device=device, dtype=torch.float32))
        self.bias: nn.Parameter | None
        if bias:
            empty = torch.zeros(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: SchemeName = "fp8_row") -> "W8A8Linear":
        """The layer in 8 bits, on the same device; ``linear`` is not changed.

        Raises:
            ValueError: it is no ``nn.Linear``, holds numbers that are not finite, or the scheme is unknown.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: {type(linear).__name__} given; wanted is an nn.Linear")
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ValueError("linear: its weight is on the meta device; load the checkpoint first")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("linear: its weight holds an infinity or a NaN, which 8 bits cannot; check the checkpoint")
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        layer = cls(*sizes, scheme=scheme, device=weight.device, dtype=weight.dtype)
        rounded = quantise(weight, scheme)
        layer.values.copy_(rounded.values)
        layer.scale.copy_(rounded.scale)
        if linear.bias is not None and layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        layer.train(linear.training)
        return layer

    @property
    def weight(self) -> Quantised:
        """The weight in 8 bits; ``.dequantise()`` gives float32 (N, K)."""
        dtype = self.bias.dtype if self.bias is not None else torch.float32
        return Quantised(self.values, self.scale, self.scheme, (self.out_features, self.in_features), dtype)

    def quantise(self, x: Tensor) -> Quantised:
        """x (..., K) as this layer would quantise it, for several layers of one scheme that read the same input."""
        return quantise(x, self.scheme)

    def forward(self, input: Tensor | Quantised) -> Tensor:
        """(..., K), or the 8-bit output of a fused norm, to (..., N) in the dtype of the input."""
        if isinstance(input, Tensor):
            kind = input.device.type
            if torch.is_autocast_enabled(kind):
                input = input.to(torch.get_autocast_dtype(kind))
        return w8a8_linear(input, self.weight, self.bias, self.kernel)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer of the rounded weights: to see what rounding the inputs adds, or to export."""
        weight = self.weight
        dtype = dtype or weight.dtype
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device=self.values.device, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(weight.dequantise())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> "W8A8Linear":
        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            eight = t is self.values or t is self.scale
            return t.to(moved.device) if eight and moved.dtype != t.dtype else moved

        return cast(W8A8Linear, super()._apply(keep, recurse))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:  # type: ignore
        stored = state_dict.get(f"{prefix}values")
        if stored is not None and stored.dtype != self.values.dtype:
            raise ValueError(
                f"{prefix}values: {stored.dtype} in the state dict, and the layer's scheme {self.scheme!r} has "
                f"{self.values.dtype}; make the layer with the scheme that was saved"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self.scheme!r}"
