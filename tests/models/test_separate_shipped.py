from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import soundfile

from allears.audio.metrics import si_sdr_db
from allears.models.separate.pipeline import Separator

DEMO = Path(__file__).parents[2] / "demo"
SOURCES = ("announcement-in-a-crowd", "talker-under-a-loudspeaker")
RATE = 16_000


@pytest.fixture(scope="module")
def separator():
    return Separator.from_pretrained(device="cpu")


def read(name: str) -> np.ndarray:
    return soundfile.read(DEMO / name, dtype="float32")[0]


def test_two_voices_that_it_never_heard_come_apart(separator):
    """The demo's mixture: an announcer and a woman of the test split, as loud as each other, all the time."""
    mixture = read("talkers/two-at-once.flac")[2 * RATE : 7 * RATE]
    voices = [read(f"clean/{name}.flac")[2 * RATE : 7 * RATE] for name in SOURCES]
    separated = separator(mixture, sample_rate_hz=RATE)
    assert separator.name == "separate-talkers-16k" and separated.count == 2
    talkers = np.asarray(separated.talkers)
    gains = [
        si_sdr_db(talkers[i], v) - si_sdr_db(mixture, v) for i, v in zip(best(talkers, voices), voices, strict=True)
    ]
    assert min(gains) > 5, gains


def best(talkers: np.ndarray, voices: list[np.ndarray]) -> tuple[int, ...]:
    """Which output holds which voice."""
    orders = permutations(range(len(talkers)), len(voices))
    return max(orders, key=lambda order: sum(si_sdr_db(talkers[i], v) for i, v in zip(order, voices, strict=True)))


def test_one_voice_stays_whole_and_is_counted_once(separator):
    voice = read("clean/announcement-in-a-crowd.flac")[: 5 * RATE]
    separated = separator(voice, sample_rate_hz=RATE)
    assert separated.count == 1
    assert si_sdr_db(np.asarray(separated.talkers)[0], voice) > 10


def test_silence_gives_silence(separator):
    separated = separator(np.zeros(RATE, np.float32), sample_rate_hz=RATE)
    assert separated.count == 0 and not np.asarray(separated.talkers).any()
