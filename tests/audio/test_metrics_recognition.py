import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allears.audio.metrics import collect_reasons, edit_distance, error_rate, phone_error_rate, word_error_rate

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "edits"),
    [("", "", 0), ("abc", "abc", 0), ("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2)],
)
def test_known_distances(hypothesis, reference, edits):
    assert edit_distance(list(hypothesis), list(reference)) == edits


@given(WORDS, WORDS, WORDS)
def test_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_error_rate_counts_per_reference_token():
    assert error_rate(["a", "x", "c", "d"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    with collect_reasons() as reasons:
        assert np.isnan(error_rate(["a"], []))
    assert reasons == {"error_rate": "the reference has no token"}


def test_word_error_rate_takes_another_recogniser_and_ignores_case_and_punctuation():
    heard = word_error_rate(np.zeros(10), "The cat, it SAT!", recognise=lambda audio, rate: ["the", "cat", "sat"])
    assert heard == 0.25


def test_phones_in_silence_give_no_score():
    pytest.importorskip("pocketsphinx")
    with collect_reasons() as reasons:
        assert np.isnan(phone_error_rate(np.zeros(16_000), np.zeros(16_000)))
    assert reasons == {"phone_error_rate": "no phone is heard in the reference"}


def test_phone_error_rate_against_given_phones():
    pytest.importorskip("pocketsphinx")
    assert phone_error_rate(np.zeros(16_000), ["AH", "B"]) == 1.0
