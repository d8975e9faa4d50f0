"""Flow matching and its solvers."""
