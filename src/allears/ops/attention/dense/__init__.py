"""Dense softmax attention: the float32 reference, and torch's fused kernels."""
