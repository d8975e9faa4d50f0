"""What is Wan's own: sizes, names in checkpoints, and the fused transformer block."""
