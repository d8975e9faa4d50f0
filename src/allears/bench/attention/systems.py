"""Who is measured: this library's kinds of attention, torch's own kernels, and the packages that people use.

A system is a function of q (B, L, H, D), k, v (B, L, G, D) and ``causal`` that returns (B, L, H, D). All that it has
to do to 16-bit tensors (smoothing, quantising, transposing) is inside it, and counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from allears.bench.attention.cases import Shape
from allears.bench.attention.peers import UnavailableError, load, sources
from allears.ops.attention import AttentionSpec, Numerics, attention, explain

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Loaded = TypeVar("Loaded")

BF16 = (0.01, 0.03)  # bounds on the relative error of the output, and of each gradient
INT8 = (0.06, 0.15)
FP4 = (0.25, None)


@dataclass(frozen=True)
class Machine:
    """Where systems are to run, and the folders to search for peers."""

    device: torch.device
    peer_folders: tuple[Path, ...] = ()

    def need_gpu(self) -> None:
        """Raises :class:`UnavailableError` on the CPU."""
        if self.device.type != "cuda":
            raise UnavailableError("needs a CUDA GPU")


@dataclass(frozen=True)
class System(Generic[Loaded]):
    """A kind of attention.

    Args:
        load: gives the function and what it is (version, kernel), or raises :class:`UnavailableError`.
        trains: whether it has gradients.
        bounds: relative errors of the output and of a gradient above which it gets no speed.
        shapes: names of the shapes that it is measured at unless it is asked for by name; all if empty.
    """

    name: str
    load: Callable[[Machine], tuple[Loaded, str]]
    trains: bool
    bounds: tuple[float, float | None]
    shapes: tuple[str, ...] = ()


class Ours:
    """This library's attention of one spec, causal or not as it is called.

    On a GPU the reference, not made for speed, is refused.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self._specs = {causal: replace(spec, causal=causal) for causal in (False, True)}
        self._kernels: dict[tuple[Any, ...], str] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        call = (tuple(q.shape), tuple(k.shape), causal, torch.is_grad_enabled() and q.requires_grad)
        if call not in self._kernels:
            self._kernels[call] = self.kernel(q, k, v, causal)
        return attention(q, k, v, self._specs[causal])

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
        """The kernel that the call runs.

        Raises:
            UnavailableError: there is none, or on a GPU the reference alone.
        """
        try:
            choice = explain(q, k, v, self._specs[causal])
        except (ValueError, ImportError) as error:
            raise UnavailableError(str(error)) from error
        if q.is_cuda and "reference" in choice.kernel:
            why = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
            raise UnavailableError(f"only the reference runs on this GPU ({why or 'no kernel of its own'})")
        return choice.kernel

    def ran(self) -> dict[str, str]:
        """What each kernel ran, in words: for the notes of a run."""
        words: dict[str, list[str]] = {}
        for (q, k, causal, grad), kernel in self._kernels.items():
            name = Shape(*q, kv_heads=k[2], causal=causal).name
            words.setdefault(kernel, []).append(f"{name} with gradients" if grad else name)
        return {kernel: ", ".join(calls) for kernel, calls in words.items()}


def _ours(numerics: Numerics, trains: bool = False, kernel: str = "auto") -> Callable[[Machine], tuple[Attend, str]]:
    def load_ours(machine: Machine) -> tuple[Attend, str]:
        ours = Ours(AttentionSpec(kernel, numerics=numerics))
        probe = torch.zeros(1, 256, 1, 128, dtype=torch.bfloat16, device=machine.device, requires_grad=trains)
        if kernel != "auto" and Ours(AttentionSpec(numerics=numerics)).kernel(probe, probe, probe, False) == kernel:
            raise UnavailableError(f"numerics {numerics!r} run kernel {kernel!r} here by themselves")
        return ours, f"kernel {ours.kernel(probe, probe, probe, False)} at head size 128"

    return load_ours


def _torch(backend: str) -> Callable[[Machine], tuple[Attend, str]]:
    def load_torch(machine: Machine) -> tuple[Attend, str]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        machine.need_gpu()
        chosen = getattr(SDPBackend, backend)

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            grouped = q.shape[2] != k.shape[2]
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            with sdpa_kernel(chosen):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        if backend == "CUDNN_ATTENTION":
            return attend, f"cuDNN {torch.backends.cudnn.version()} through torch {torch.__version__}"
        return attend, f"torch {torch.__version__}"

    return load_torch


def _flash_attention_4(machine: Machine) -> tuple[Attend, str]:
    machine.need_gpu()
    try:
        flash_attn_func = import_module("flash_attn.cute").flash_attn_func
        about = f"flash-attn-4 {version('flash-attn-4')}, nvidia-cutlass-dsl {version('nvidia-cutlass-dsl')}"
    except (ImportError, PackageNotFoundError) as error:
        raise UnavailableError(f"flash-attn-4 does not import: {error}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        found = flash_attn_func(q, k, v, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return attend, about


def _sage(major: str) -> Callable[[Machine], tuple[Attend, str]]:
    def load_sage(machine: Machine) -> tuple[Attend, str]:
        machine.need_gpu()
        module, found = load("sageattention", major, machine.peer_folders)
        about = f"sageattention {found}, {sources(module)}"

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            return module.sageattn(q, k, v, tensor_layout="NHD", is_causal=causal)

        return attend, about

    return load_sage


TRITON_SHAPES = ("1x32760x12x128", "4x8192x16x128", "4x8192x16x128 causal", "4x8192x16x64")
"""Where the kernels that a Hopper GPU has better ones for are measured too: other GPUs run them."""
SYSTEMS: tuple[System[Attend], ...] = (
    System("allears-int8fp8", _ours("int8_fp8"), False, INT8),
    System("allears-int8fp16", _ours("int8_fp16"), False, INT8),
    System("allears-sagebwd", _ours("sagebwd", trains=True), True, INT8),
    System("allears-int8fp8-triton", _ours("int8_fp8", kernel="triton"), False, INT8, TRITON_SHAPES),
    System("allears-sagebwd-triton", _ours("sagebwd", trains=True, kernel="triton"), True, INT8, TRITON_SHAPES),
    System("allears-nvfp4", _ours("nvfp4"), False, FP4),
    System("allears-exact", _ours("exact", trains=True), True, BF16),
    System("fa2", _torch("FLASH_ATTENTION"), True, BF16),
    System("cudnn", _torch("CUDNN_ATTENTION"), True, BF16),
    System("flash-attn-4", _flash_attention_4, True, BF16),
    System("sageattention-2.2", _sage("2"), False, INT8),
    System("sageattention-1.0.6", _sage("1"), False, INT8),
)


def select(names: Sequence[str]) -> list[System[Attend]]:
    """Those of :data:`SYSTEMS`, as :func:`pick` has it."""
    return pick(names, SYSTEMS)


def pick(names: Sequence[str], of: Sequence[System[Loaded]]) -> list[System[Loaded]]:
    """The systems of those names, or all.

    Raises:
        ValueError: a name is unknown.
    """
    known = {system.name: system for system in of}
    for name in names:
        if name not in known:
            raise ValueError(f"systems: {name!r} is unknown; known are {', '.join(known)}")
    return [replace(known[name], shapes=()) for name in names] if names else list(of)
