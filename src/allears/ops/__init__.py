"""Functions on tensors, and their kernels. No nn.Module lives here."""
