"""The weights that ship: they show what is asked for, the same for the same seed."""

import torch

from allears.data.world_check import check_videos
from allears.data.world_text import parse
from allears.models.video import VideoGenerator

GENERATOR = VideoGenerator.from_pretrained(device="cpu")


def seen(text, frames, seed):
    video = torch.as_tensor(frames).permute(3, 0, 1, 2)[None].float() / 255
    return check_videos(video, [parse(text, seed)])[0].seen


def test_one_step_shows_colour_and_place_and_nothing_else():
    texts = ("a small green box falls on a beach", "a big white triangle rolls left at night")
    made = {}
    for text in texts:
        made[text] = GENERATOR(text, seed=2, steps=1).frames
        found = seen(text, made[text], 2)
        assert all(found[name] for name in ("colour 1", "background", "nothing else")), (text, found)
        assert not seen("a big red star rises by day", made[text], 2)["colour 1"]
    assert seen(texts[0], made[texts[0]], 2)["motion 1"]


def test_the_same_seed_gives_the_same_and_another_seed_another():
    text = "a yellow ball stays in a room"
    first, again, other = (GENERATOR(text, seed=seed, steps=1).frames for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()
