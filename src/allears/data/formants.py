"""More speakers than were recorded: which voices of a clip get other formants, and by how much."""

from collections.abc import Hashable, Sequence

import numpy as np


def formant_ratios(
    speakers: Sequence[Hashable], share: float, span: tuple[float, float], rng: np.random.Generator
) -> list[float]:
    """Ratio for each talker of a clip, as ``audio.formants.shift_formants`` takes it; 1.0 leaves the voice as it is.

    A ratio is uniform in its logarithm over ``span``. Copies of one speaker in a clip are changed together, and lie
    evenly over the span, so that they are never alike: two of them are half of it apart.

    Args:
        speakers: who each talker is.
        share: probability, in [0, 1], that a speaker is changed.
        span: lowest and highest ratio.
    """
    low, high = np.log(span)
    ratios = [1.0] * len(speakers)
    for speaker in dict.fromkeys(speakers):
        if rng.random() >= share:
            continue
        copies = [place for place, who in enumerate(speakers) if who == speaker]
        first = rng.random()
        for number, place in enumerate(copies):
            part = (first + number / len(copies)) % 1.0
            ratios[place] = round(float(np.exp(low + (high - low) * part)), 3)
    return ratios
