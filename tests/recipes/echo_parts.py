"""A corpus and rooms in small for the echo canceller's recipe, made in memory."""

from copy import copy

import numpy as np
import soundfile
import torch

from allears.data.bank import AudioBank
from allears.data.corpus import Item, write_manifest
from allears.data.echo_render import EchoRenderer
from allears.data.reverb import RirBank
from allears.recipes.echo_data import EchoData

SMALL = {"preset": "test", "batch": 2, "seconds": 0.5, "device": "cpu", "validation_clips": 3}


def half(mic, reference):
    """Stands in for a linear canceller."""
    return 0.5 * mic, 0.5 * reference


def sounds():
    """(item, samples int16): four talkers in training, two in validation; a noise, a knock and a tune in each."""
    rng = np.random.default_rng(3)
    made = []

    def add(name, kind, split, samples, **facts):
        samples = np.clip(32767 * samples, -32767, 32767).astype(np.int16)
        path = f"{kind}/{name}.flac"
        made.append(
            (Item(name, kind, split, path, 16_000, len(samples), "p", "1", "0" * 64, name, "CC0", **facts), samples)
        )

    time = np.arange(16_000) / 16_000
    for number, split in enumerate(("train",) * 4 + ("val",) * 2):
        for take in range(2):
            tone = sum(np.sin(2 * np.pi * k * (100 + 30 * number) * time + rng.uniform(0, 6)) / k for k in range(1, 9))
            rhythm = np.clip(np.sin(2 * np.pi * 4 * time + rng.uniform(0, 6)), 0, None)
            add(f"voice-{number}-{take}", "speech", split, 0.1 * tone * rhythm, speaker=f"s{number}")
    for split in ("train", "val"):
        add(f"hiss-{split}", "noise", split, 0.1 * rng.standard_normal(9000))
        add(f"knock-{split}", "event", split, 0.3 * np.exp(-np.arange(3000) / 300) * rng.standard_normal(3000))
        add(f"tune-{split}", "music", split, 0.1 * np.sin(2 * np.pi * 440 * time))
    return made


def write_corpus(folder):
    for item, samples in sounds():
        (folder / item.path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / item.path, samples, 16_000, subtype="PCM_16")
    write_manifest(folder, [item for item, _ in sounds()])
    return str(folder)


def small_data(device="cpu"):
    made = sounds()
    lengths = np.array([len(samples) for _, samples in made], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    bank = AudioBank(np.concatenate([samples for _, samples in made]), starts, lengths, [item for item, _ in made])

    def part(speech, split):
        return bank.select(lambda item: (item.kind == "speech") == speech and item.split == split)

    fall = torch.exp(-torch.arange(600) / 100) * torch.randn(3, 4, 600, generator=torch.Generator().manual_seed(0))
    fall[..., 16] = 2.0
    renderer = EchoRenderer(bank, bank, RirBank(fall.to(device)), torch.device(device))
    held = copy(renderer)
    held.rirs = RirBank(fall[:1].flip(-2).to(device))
    return EchoData(part(True, "train"), part(False, "train"), part(True, "val"), part(False, "val"), renderer, held)
