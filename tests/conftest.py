"""Things that several tests share."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


SETTINGS = {  # of a whole process or of its main thread, and what sets them
    "num_threads": (torch.get_num_threads, torch.set_num_threads),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "deterministic_algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "autocast_enabled": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda enabled: torch.set_autocast_enabled("cpu", enabled),
    ),
    "flush_denormal": (lambda: float(torch.tensor(1e-40) * 1) == 0.0, torch.set_flush_denormal),
}


@contextmanager
def settings_left_alone() -> Iterator[None]:
    """What is set in the block and not put back makes other tests' numbers depend on which ran before them."""
    before = {name: get() for name, (get, _) in SETTINGS.items()}
    yield
    changed = {name: after for name, (get, _) in SETTINGS.items() if (after := get()) != before[name]}
    for name in changed:
        SETTINGS[name][1](before[name])
    assert not changed, f"torch's settings {changed} were left behind; they were { {n: before[n] for n in changed} }"


def threads_left(before: set[threading.Thread], patience_s: float) -> list[str]:
    """Names of the threads beyond those of ``before`` that go on after ``patience_s``; that of tqdm, which watches all
    progress bars of a process from the first on, is not among them, nor are threads that Python did not start (a GPU's
    of torch's backward passes) and those that torch.compile keeps for its compilers on a GPU."""
    end = time.monotonic() + patience_s
    while left := [
        t.name
        for t in threading.enumerate()
        if t not in before
        and t.name != "tqdm_monitor"
        and t.name != "InductorSubproc"
        and not isinstance(t, threading._DummyThread)
    ]:
        gc.collect()  # a pool ends its threads when nobody holds it any more
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return left


@pytest.fixture(autouse=True)
def leaves_settings_alone() -> Iterator[None]:
    with settings_left_alone():
        yield


@pytest.fixture(autouse=True, scope="module")
def module_leaves_no_trace() -> Iterator[None]:
    """No settings and no threads. A thread of an earlier module draws from Python's ``random`` (the pings of a
    websocket that was not closed), prints, or takes the processor, while a later test needs them for itself.
    """
    before = set(threading.enumerate())
    with settings_left_alone():
        yield
    left = threads_left(before, patience_s=20.0)
    assert not left, f"threads {left} go on after the tests of this file: close what started them"


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
