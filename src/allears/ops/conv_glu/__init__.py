"""Feed-forward with a neighbourhood, norm and residual included: x + narrow(SwiGLU(widen(norm(x))))."""

from allears.ops.conv_glu.call import conv_swiglu, runs_kernel

__all__ = ["conv_swiglu", "runs_kernel"]
