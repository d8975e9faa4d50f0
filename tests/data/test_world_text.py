import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.data.world import Thing, WorldSpec, draw_spec
from allears.data.world_text import CAPTION_WORDS, PHRASES, WORDS, caption, encode, parse, split_words


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["train", "test"]))
def test_captions_are_read_back(seed, split):
    rng = np.random.default_rng(seed)
    spec = draw_spec(rng, split)
    text = caption(spec, rng)
    assert len(split_words(text)) <= CAPTION_WORDS
    read = parse(text, spec.seed)
    assert dataclasses.replace(spec, background=read.background) == read
    assert read.background in (None, spec.background)
    assert parse(caption(spec), spec.seed) == spec


def test_a_sentence_of_the_readme():
    assert parse("A red ball rolls left behind a blue box.", seed=4) == WorldSpec(
        (Thing("ball", "red", motion="rolls left"), Thing("box", "blue")), "behind", seed=4
    )
    assert parse("at night, while the camera zooms in, a huge green star spins around") == WorldSpec(
        (Thing("star", "green", "big", "spins"),), None, "zooms in", "night"
    )
    assert parse("a small red ball and a white square falls").things[1] == Thing("box", "white", motion="falls")


def test_plain_captions():
    pair = (Thing("ball", "orange", motion="rolls left"), Thing("box", "blue", "big"))
    spec = WorldSpec(pair, "in front of", "pans left", "beach")
    words = "an orange ball rolls left in front of a big blue box on a beach while the camera pans left"
    assert caption(spec) == words


def test_every_phrase_is_drawn_and_known():
    rng = np.random.default_rng(0)
    text = " | ".join(caption(draw_spec(rng), rng) for _ in range(900))
    for kind, meanings in PHRASES.items():
        for phrases in meanings.values():
            for phrase in phrases:
                assert all(word in WORDS for word in phrase.split()), phrase
                if phrase not in ("the", "medium", "."):
                    assert phrase in text, (kind, phrase)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("a red dog", "the word 'dog' is unknown.*known are"),
        ("a yelow ball", "did you mean 'yellow'"),
        ("a ball falls", "the ball has no colour; say one of red"),
        ("red", "no thing is named at the end"),
        ("falls", "'falls' stands before any thing"),
        ("behind a red ball", "stands before any thing"),
        ("a red ball a blue box", "nothing joins the ball and the box"),
        ("a red ball behind", "nothing follows 'behind'"),
        ("a red ball falls spins", "'falls' and 'spins'"),
        ("a red blue ball", "'red' and 'blue'"),
        ("a red small ball", "stands after the colour"),
        ("a red falls ball", "'red' is followed by no thing"),
        ("a red ball and a red box", "different colours"),
        ("a red ball behind a blue box falls", "it stays"),
        ("a red ball and a blue box and a green star", "a third thing, the star"),
        ("a front ball", "'front' is known from 'in front of'"),
        ("a red ball at night by day", "'night' and 'day'"),
        (" ".join(["red"] * 33), "33 words given"),
    ],
)
def test_what_cannot_be_read_is_said(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_numbers_of_words():
    found = encode("a red ball", length=6)
    assert [WORDS[number] for number in found] == ["a", "red", "ball", "<pad>", "<pad>", "<pad>"]
    assert encode("", length=4) == [0, 0, 0, 0] and len(set(WORDS)) == len(WORDS)
    with pytest.raises(ValueError, match="does not know the word 'red'"):
        encode("a red ball", words=("<pad>", "a", "ball"))
    with pytest.raises(ValueError, match="takes 2"):
        encode("a red ball", length=2)
