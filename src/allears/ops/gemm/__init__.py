"""Matrix products of 8-bit values: INT8 or E4M3 weights and activations, scaled by row or by tile (W8A8)."""
