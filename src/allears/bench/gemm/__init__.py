"""The benchmark of 8-bit linear layers: whole, with the quantisation of their inputs, at the shapes of video models."""
