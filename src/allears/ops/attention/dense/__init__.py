"""Dense softmax attention: the float32 reference, torch's fused kernels, and flash-attn-4 where it is installed."""
