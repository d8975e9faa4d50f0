"""Who is measured, each as a function that prepares a call on the inputs of a case.

Shapes: M rows, K channels in, N out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allears.bench.attention.peers import UnavailableError
from allears.bench.gemm.inputs import Inputs
from allears.nn.w8a8 import W8A8Linear
from allears.ops.gemm.call import explain, quantise
from allears.ops.gemm.schemes import Quantised
from allears.ops.norm.fused import activate_quantised, layer_norm_modulated, residual_norm

Run = Callable[[], Tensor | Quantised]


@dataclass(frozen=True)
class System:
    """A way to run a case.

    Args:
        name: for rows; what begins with ``allears`` is ours.
        about: what it is, for the notes.
        prepare: makes the call; raises :class:`UnavailableError`, ValueError or RuntimeError where it cannot run.
        kinds: of the cases that it runs.
        bound: relative error above which there is no speed.
    """

    name: str
    about: str
    prepare: Callable[[Inputs], Run]
    kinds: tuple[str, ...] = ("linear",)
    bound: float = 0.1


def _linear(inputs: Inputs) -> nn.Linear:
    assert inputs.linear is not None, "a linear case"
    return inputs.linear


def _need_gpu(inputs: Inputs) -> None:
    if not inputs.x.is_cuda:
        raise UnavailableError("needs a CUDA GPU")


def _bf16(inputs: Inputs) -> Run:
    linear = _linear(inputs)
    return lambda: linear(inputs.x)


def _ours(scheme: str, kernel: str = "auto") -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        layer = W8A8Linear.from_linear(_linear(inputs), scheme)  # type: ignore
        layer.kernel = kernel
        explain(inputs.x, layer.weight, layer.bias, kernel)
        return lambda: layer(inputs.x)

    return prepare


def _cublas_fp8(inputs: Inputs) -> Run:
    _need_gpu(inputs)
    linear = _linear(inputs)
    top = 448.0
    w_scale = (linear.weight.abs().amax().float() / top).reshape(1, 1)
    weight = (linear.weight.float() / w_scale).to(torch.float8_e4m3fn).t()

    def whole(x: Tensor) -> Tensor:
        scale = (x.abs().amax().float() / top).reshape(1, 1)
        values = (x.float() / scale).clamp(-top, top).to(torch.float8_e4m3fn)
        how = {"bias": linear.bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(values, weight, scale, w_scale, **how)

    compiled = torch.compile(whole)
    return lambda: compiled(inputs.x)


def _cublas_int8(inputs: Inputs) -> Run:
    _need_gpu(inputs)
    linear = _linear(inputs)
    weight = quantise(linear.weight.detach(), "int8_row")
    columns = weight.values.t()

    def scaled(sums: Tensor, scale: Tensor) -> Tensor:
        return (sums.float() * scale[:, None] * weight.scale + linear.bias.float()).bfloat16()

    compiled = torch.compile(scaled)

    def run() -> Tensor:
        x = quantise(inputs.x, "int8_row")
        return compiled(torch._int_mm(x.values, columns), x.scale)

    return run


def _torchao(name: str) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        _need_gpu(inputs)
        try:
            package = import_module("torchao.quantization")
        except ImportError as error:
            raise UnavailableError(f"torchao does not import: {error}") from error
        linear = _linear(inputs)
        layer = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, device="meta"))
        layer[0].load_state_dict(linear.state_dict(), assign=True)
        config = getattr(package, name)(granularity=package.PerRow())
        package.quantize_(layer, config)
        compiled = torch.compile(layer)
        return lambda: compiled(inputs.x)

    return prepare


def torchao_version() -> str:
    """Of the installed one, or why there is none."""
    try:
        return f"torchao {version('torchao')}"
    except ImportError:
        return "torchao is not installed"


def _torch_rows(inputs: Inputs, compiled: bool) -> Run:
    if compiled:
        _need_gpu(inputs)
    x, branch, gate, scale, shift = inputs.x, inputs.branch, inputs.gate, inputs.scale, inputs.shift

    def whole(x: Tensor) -> Tensor:
        if branch is None or gate is None or scale is None or shift is None:
            return F.gelu(x, approximate="tanh")
        total = (x.float() + branch.float() * gate[0]).type_as(x)
        normed = F.layer_norm(total.float(), (x.shape[1],), eps=1e-6)
        return (normed * (1 + scale[0]) + shift[0]).type_as(x)

    call = torch.compile(whole) if compiled else whole
    return lambda: call(x)


def _fused_rows(scheme: str | None) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        if inputs.branch is None:
            if scheme is None:
                raise UnavailableError("an activation alone, in 16 bits, is PyTorch's own")
            return lambda: activate_quantised(inputs.x, "gelu_tanh", scheme)
        x, branch = inputs.x[None], inputs.branch[None]
        given = (x, branch, inputs.gate, inputs.scale, inputs.shift)

        def run() -> Tensor | Quantised:
            out = residual_norm(*given, scheme=scheme)[1]
            return out[0] if isinstance(out, Tensor) else out._replace(shape=out.shape[1:])

        return run

    return prepare


def _then_quantise(inputs: Inputs) -> Run:
    """Two kernels of ours where one would do: what fusing saves."""
    if inputs.branch is None:
        return lambda: quantise(F.gelu(inputs.x, approximate="tanh"), "fp8_row")
    x, branch = inputs.x[None], inputs.branch[None]
    assert inputs.gate is not None
    gate = inputs.gate

    def run() -> Quantised:
        total = (x.float() + branch.float() * gate).type_as(x)
        normed = layer_norm_modulated(total, inputs.scale, inputs.shift)
        assert isinstance(normed, Tensor)
        return quantise(normed[0], "fp8_row")

    return run


_ROWS = ("norm", "gelu")
SYSTEMS: tuple[System, ...] = (
    System("cublas-bf16", "nn.Linear", _bf16, bound=0.01),
    System("allears-fp8_row", "W8A8Linear, the kernel that auto takes", _ours("fp8_row")),
    System("allears-fp8_row-cublas", "our quantiser, cuBLAS's product with scales by row", _ours("fp8_row", "cublas")),
    System("allears-fp8_row-triton", "our quantiser, our product", _ours("fp8_row", "triton")),
    System("allears-fp8_tile", "scales by 128 x 128", _ours("fp8_tile")),
    System("allears-int8_row", "scales by row", _ours("int8_row")),
    System("allears-int8_tile", "scales by 128 x 128, as published", _ours("int8_tile")),
    System("cublas-fp8", "a scale a tensor, torch._scaled_mm, the rest by torch.compile", _cublas_fp8),
    System("cublas-int8", "our quantiser, torch._int_mm, scaled by torch.compile", _cublas_int8),
    System("torchao-fp8", "PerRow, compiled", _torchao("Float8DynamicActivationFloat8WeightConfig")),
    System("torchao-int8", "PerRow, compiled", _torchao("Int8DynamicActivationInt8WeightConfig")),
    System("torch", "eager, in 16 bits", lambda inputs: _torch_rows(inputs, False), _ROWS, 0.01),
    System("torch-compile", "in 16 bits", lambda inputs: _torch_rows(inputs, True), _ROWS, 0.01),
    System("allears", "one kernel, in 16 bits", _fused_rows(None), _ROWS, 0.01),
    System("allears-apart", "PyTorch's or our own norm, then our quantiser, fp8_row", _then_quantise, _ROWS),
    *(System(f"allears-{s}", "", _fused_rows(s), _ROWS) for s in ("fp8_row", "fp8_tile", "int8_row", "int8_tile")),
)


def select(names: tuple[str, ...]) -> list[System]:
    """The systems of those names, or all; a name may stand for a layer and for rows.

    Raises:
        ValueError: a name is unknown.
    """
    known = dict.fromkeys(system.name for system in SYSTEMS)
    for name in names:
        if name not in known:
            raise ValueError(f"systems: {name!r} is unknown; known are {', '.join(known)}")
    return [system for system in SYSTEMS if not names or system.name in names]
