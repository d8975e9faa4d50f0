import numpy as np
import pytest
from banks import bank_of

from allears.data.bank import AudioBank
from allears.data.cast import Cast, pitches_hz

RATE = 16_000
PITCHES = (100.0, 110.0, 150.0, 180.0, 215.0)


def cast(seed=0, known=True):
    """Five speakers of two utterances each, of one pitch each."""
    plain = bank_of([RATE] * 10, ["speech"] * 10, 0, 5)
    names = sorted({item.speaker for item in plain.items})
    items = [np.array([n for n, item in enumerate(plain.items) if item.speaker == name]) for name in names]
    audio = np.zeros_like(plain.audio)
    t = np.arange(RATE) / RATE
    for found, pitch in zip(items, PITCHES, strict=True):
        wave = sum(np.cos(2 * np.pi * pitch * k * t) / k for k in range(1, 8))
        for index in found:
            audio[plain.starts[index] : plain.starts[index] + RATE] = (8000 * wave).astype(np.int16)
    bank = AudioBank(audio, plain.starts, plain.lengths, plain.items)
    rng = np.random.default_rng(seed)
    return Cast(bank, items, np.full(5, 0.2), rng, pitches_hz(bank, items) if known else None)


def test_pitches_of_speakers_are_found():
    np.testing.assert_allclose(cast().pitch_hz, PITCHES, rtol=0.01)
    silent = bank_of([400, RATE], ["speech"] * 2, 0, 2)
    found = pitches_hz(AudioBank(np.zeros_like(silent.audio), silent.starts, silent.lengths, silent.items), [[0], [1]])
    assert np.isnan(found).all()


def test_level_voices_are_distinct_and_of_one_pitch():
    someone = cast()
    pairs = set()
    for _ in range(300):
        voices = someone.level(2, False, (0.8, 1.25), lambda: 1.0)
        who = [next(n for n, items in enumerate(someone.items) if items is found) for found, _ in voices]
        assert len(set(who)) == 2
        heard = [PITCHES[n] * speed for n, (_, speed) in zip(who, voices, strict=True)]
        assert abs(np.log(heard[1] / heard[0])) < 0.07 and 0.8 <= voices[1][1] <= 1.25 and voices[0][1] == 1.0
        pairs.add(tuple(sorted(who)))
    assert pairs == {(0, 1), (2, 3), (3, 4)}


def test_a_span_that_is_too_narrow_takes_any_two():
    someone = cast()
    voices = someone.level(2, False, (0.999, 1.001), lambda: 1.0, within=0.0)
    assert len(voices) == 2 and voices[0][0] is not voices[1][0]


def test_level_without_pitches_is_refused():
    with pytest.raises(ValueError, match="pitch_hz: None given"):
        cast(known=False).level(2, False, (0.8, 1.25), lambda: 1.0)
