"""What the tests of the Triton kernels share."""

from tests.ops.lowbit.conftest import poison

__all__ = ["poison"]
