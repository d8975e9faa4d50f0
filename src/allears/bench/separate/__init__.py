"""The benchmark of separators: time and memory over length, published attention beside optimised and linear."""
