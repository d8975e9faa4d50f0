"""Video diffusion: a stock Wan transformer step by step made faster, each change alone and all together."""
