"""Things that several tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # kernels run in Triton's interpreter, which must be chosen before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from allears.data.corpus import Item, write_manifest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` need a CUDA device."""
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def voice_like(rng: np.random.Generator, seconds: float, pitch_hz: float) -> np.ndarray:
    """Harmonics with a syllable rhythm: enough like speech for a mixture, and for a network to tell from noise."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    phase = 2 * np.pi * pitch_hz * time + 0.3 * np.sin(2 * np.pi * 5 * time)
    tone = sum(np.sin(k * phase) / k for k in range(1, 12))
    rhythm = np.clip(np.sin(2 * np.pi * 3 * time + rng.uniform(0, 6)), 0, None)
    return (0.12 * tone * rhythm).astype(np.float32)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus in small: two talkers and two noises in training, one of each in validation and test, and a
    recorded room.
    """
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    items = []

    def add(name: str, kind: str, split: str, samples: np.ndarray, rate: int = 16_000, **facts: str) -> None:
        path = f"{kind}/{name}.flac"
        (folder / kind).mkdir(exist_ok=True)
        soundfile.write(folder / path, samples, rate, subtype="PCM_16")
        items.append(Item(name, kind, split, path, rate, len(samples), "made-up", "1", "0" * 64, name, "CC0", **facts))

    for split, pitches in (("train", (110, 190)), ("val", (140,)), ("test", (160,))):
        for pitch in pitches:
            for take in range(2):
                add(f"voice-{pitch}-{take}", "speech", split, voice_like(rng, 2.5, pitch), speaker=f"s{pitch}")
        add(f"hiss-{split}", "noise", split, 0.1 * rng.standard_normal(40_000).astype(np.float32))
        knock = np.exp(-np.arange(4000) / 300) * rng.standard_normal(4000) * 0.3
        add(f"knock-{split}", "event", split, knock.astype(np.float32), label="knock")
    add(
        "stairs",
        "rir",
        "test",
        (np.exp(-np.arange(9000) / 1500) * rng.standard_normal(9000) * 0.2).astype(np.float32),
        22_050,
    )
    write_manifest(folder, items)
    return folder
