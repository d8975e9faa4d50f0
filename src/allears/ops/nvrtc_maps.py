"""Descriptors of tensors for bulk copies, which kernels of ``nvrtc.py`` are given."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_uint, c_void_p

import torch
from torch import Tensor

from allears.ops.nvrtc_launch import check, driver

_MAP_TYPES = dict.fromkeys((torch.uint8, torch.int8, torch.float8_e4m3fn), 0) | {
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_SWIZZLE = {32: 1, 64: 2, 128: 3}
_L2_PROMOTION_256 = 3


class TensorMap(ctypes.Structure):
    """Descriptor of a tensor for bulk copies: 128 bytes, aligned to 64."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)
    _align_ = 64


def tensor_map(x: Tensor, box: Sequence[int], swizzle_bytes: int) -> TensorMap:
    """For copies of boxes of ``x``, whose last dimension is contiguous. Reads past an edge give zeros.

    Args:
        box: elements in each dimension, in the order of ``x.shape``.
        swizzle_bytes: 32, 64 or 128: bytes of the innermost row of the box.
    """
    made = TensorMaps(x, box, swizzle_bytes)
    made.move(x.data_ptr())
    return made.map


class TensorMaps:
    """The :func:`tensor_map` of tensors like ``x``, one after the other: ``map``, since the last :meth:`move`."""

    def __init__(self, x: Tensor, box: Sequence[int], swizzle_bytes: int) -> None:
        dims = x.dim()
        if x.stride(-1) != 1:
            raise ValueError(f"x: last stride {x.stride(-1)} given; bulk copies need 1")
        buffer = (ctypes.c_char * (ctypes.sizeof(TensorMap) + 64))()
        address = (ctypes.addressof(buffer) + 63) & ~63
        self.map = TensorMap.from_address(address)
        self.map._keep = buffer  # type: ignore[attr-defined]
        sizes = (ctypes.c_uint64 * dims)(*reversed(x.shape))
        strides = (ctypes.c_uint64 * (dims - 1))(*(x.stride(i) * x.element_size() for i in reversed(range(dims - 1))))
        boxes = (ctypes.c_uint32 * dims)(*reversed(tuple(box)))
        steps = (ctypes.c_uint32 * dims)(*([1] * dims))
        self._before = c_void_p(address), c_int(_MAP_TYPES[x.dtype]), c_uint(dims)
        self._after = (
            sizes, strides, boxes, steps, c_int(0), c_int(_SWIZZLE[swizzle_bytes]), c_int(_L2_PROMOTION_256), c_int(0),
        )  # fmt: skip
        self._at: int | None = None

    def move(self, address: int) -> None:
        """To the tensor whose first element is there."""
        if address != self._at:
            self._at = None
            check(driver().cuTensorMapEncodeTiled(*self._before, c_void_p(address), *self._after), "tensor map")
            self._at = address
