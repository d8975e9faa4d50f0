"""Convolutions that PyTorch runs slowly in the layout of linear layers."""
