"""Tiny banks of noise-like samples, made by hand."""

import numpy as np

from allears.data.bank import AudioBank
from allears.data.corpus import Item


def bank_of(lengths, kinds, seed=0, speakers=2):
    """Items ``i0``, ``i1``, ... of speakers ``s0``, ``s1``, ... in turn."""
    rng = np.random.default_rng(seed)
    audio = np.clip(rng.standard_normal(sum(lengths)) * 3000, -32768, 32767).astype(np.int16)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    items = [
        Item(f"i{n}", kind, "train", "", 16_000, length, "p", "1", "0", "", "CC0", speaker=f"s{n % speakers}")
        for n, (length, kind) in enumerate(zip(lengths, kinds, strict=True))
    ]
    return AudioBank(audio, starts, np.array(lengths, np.int64), items)
