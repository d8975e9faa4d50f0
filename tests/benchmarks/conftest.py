"""The benchmarks are no part of the installed package: they are imported from the repository's root."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A test set of three clips of half a second: noise as the voice, other noise at 6 dB; the last one reverberant."""
    from benchmarks.clips import Clip, write_folder

    rng = np.random.default_rng(0)

    def clips():
        for i in range(3):
            voice = (0.1 * rng.standard_normal(8000)).astype(np.float32)
            noisy = voice + (0.05 * rng.standard_normal(8000)).astype(np.float32)
            yield Clip(f"clip{i}", noisy, voice, {"reverberant": i == 2})

    assert write_folder(tmp_path / "set", clips()) == 3
    return tmp_path / "set"
