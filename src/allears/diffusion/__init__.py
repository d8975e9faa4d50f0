"""Flow matching, its solvers, and distillation to a few steps (rCM)."""
