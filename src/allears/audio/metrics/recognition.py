"""Error rates of a speech recogniser that listens to the estimate: what a listener would have misheard.

The recogniser is the small English one in the package ``pocketsphinx``. Its phones also serve other languages, as a
measure of change: the phones heard in the estimate against those heard in the clean reference."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.errors import require

from .inputs import mono, want_16_khz
from .reasons import unscored

_NOT_PHONES = {"SIL", "+SPN+", "+NSN+", "+BREATH+", "+COUGH+", "+NOISE+", "+SMACK+", "+UH+", "+UM+"}


def edit_distance(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """Fewest substitutions, insertions and deletions between two token sequences (Levenshtein)."""
    row = list(range(len(reference) + 1))
    for i, token in enumerate(hypothesis, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(reference, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (token != wanted))
    return row[-1]


def error_rate(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Edits per reference token; 0 is perfect, above 1 is possible. NaN where the reference is empty."""
    if not reference:
        return unscored("error_rate", "the reference has no token")
    return edit_distance(hypothesis, reference) / len(reference)


@lru_cache(maxsize=2)
def _decoder(kind: str) -> Any:
    sphinx = require("pocketsphinx", "eval", "speech recognition for error rates")
    if kind == "words":
        return sphinx.Decoder(loglevel="FATAL")
    model = Path(sphinx.get_model_path("en-us")) / "en-us-phone.lm.bin"
    return sphinx.Decoder(allphone=str(model), lw=2.0, beam=1e-20, pbeam=1e-20, loglevel="FATAL", lm=None, dict=None)


def _decode(kind: str, audio: Any, sample_rate_hz: int) -> Any:
    want_16_khz("speech recognition", sample_rate_hz)
    samples = np.clip(np.round(mono("audio", audio) * 32767), -32768, 32767).astype("<i2")
    decoder = _decoder(kind)
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    return decoder


def recognise_words(audio: Any, sample_rate_hz: int = 16_000) -> list[str]:
    """English words heard in (T,) float audio at 16 kHz, in lower case.

    Raises:
        ValueError: another rate, other shapes, NaN.
        MissingDependencyError: ``pocketsphinx`` is missing.
    """
    if not np.any(audio):  # the recogniser would hear its own dither
        return []
    found = _decode("words", audio, sample_rate_hz).hyp()
    return [] if found is None else found.hypstr.split()


def recognise_phones(audio: Any, sample_rate_hz: int = 16_000) -> list[str]:
    """Phones (ARPAbet, without silence and noises) heard in (T,) float audio at 16 kHz. Errors as for words."""
    if not np.any(audio):
        return []
    segments = _decode("phones", audio, sample_rate_hz).seg() or ()
    return [segment.word for segment in segments if segment.word not in _NOT_PHONES]


def word_error_rate(
    estimate: Any,
    transcript: str,
    sample_rate_hz: int = 16_000,
    recognise: Callable[[Any, int], list[str]] = recognise_words,
) -> float:
    """Errors per word of the English ``transcript`` when a recogniser hears the estimate.

    Args:
        estimate: (T,) float, 16 kHz.
        transcript: the words said; case and punctuation do not count.
        recognise: another recogniser, ``(audio, sample_rate_hz) -> words``.

    Raises:
        ValueError, MissingDependencyError: as :func:`recognise_words`.
    """
    kept = "".join(c if c.isalnum() or c in "' " else " " for c in transcript.lower())
    return error_rate(recognise(estimate, sample_rate_hz), kept.split())


def phone_error_rate(estimate: Any, reference: Any, sample_rate_hz: int = 16_000) -> float:
    """Errors per phone when the recogniser hears the estimate, against what it hears in the clean reference.

    Args:
        estimate: (T,) float, 16 kHz.
        reference: (T2,) float, clean speech; or the phones themselves, a list of ARPAbet names.

    Raises:
        ValueError, MissingDependencyError: as :func:`recognise_words`.
    """
    given = isinstance(reference, list | tuple)
    wanted = list(reference) if given else recognise_phones(reference, sample_rate_hz)
    if not wanted:
        return unscored("phone_error_rate", "no phone is heard in the reference")
    return error_rate(recognise_phones(estimate, sample_rate_hz), wanted)
