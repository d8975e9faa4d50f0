from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from allears.data.world import Thing, WorldSpec, draw_specs
from allears.data.world_check import Check, check_videos, consistency_db, summary
from allears.data.world_render import render


@lru_cache
def painted(count=10):
    specs = tuple(draw_specs(count, 21))
    return specs, render(specs)


@lru_cache
def video_of(spec):
    return render([spec])


@lru_cache
def found(shown, asked):
    return check_videos(video_of(shown), [asked])[0].seen


def judged(shown, asked):
    return dict(found(shown, asked))


def one(spec):
    return judged(spec, spec)


def test_true_videos_pass_and_other_captions_do_not():
    specs, videos = painted()
    true = summary(check_videos(videos, specs))
    assert true["prompt_score"] > 99 and true["all_right"] > 90
    other = summary(check_videos(videos[:3], specs[1:4]))
    assert other["prompt_score"] < 30 and other["all_right"] == 0


def test_noise_and_blur_do_not_disturb():
    specs, videos = painted()
    videos, specs = videos[6:8], specs[6:8]
    noisy = videos + 0.05 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    assert summary(check_videos(noisy.clamp(0, 1), specs))["prompt_score"] > 97
    blurred = torch.nn.functional.avg_pool3d(videos, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    assert summary(check_videos(blurred, specs))["prompt_score"] > 90


BALL = Thing("ball", "red", "medium", "rolls left")
BASE = WorldSpec((BALL,), background="room", seed=5)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"motion": "rolls right"}, {"motion 1"}),
        ({"motion": "stays"}, {"motion 1"}),
        ({"motion": "bounces"}, {"motion 1"}),
        ({"shape": "star"}, {"shape 1"}),
        ({"size": "big"}, {"size 1"}),
        ({"size": "small"}, {"size 1"}),
        ({"colour": "orange"}, {"colour 1", "shape 1", "size 1", "motion 1", "nothing else"}),
    ],
)
def test_each_fault_is_found_where_it_is(change, missing):
    seen = judged(BASE, replace(BASE, things=(replace(BALL, **change),)))
    assert {name for name, there in seen.items() if not there} == missing
    assert all(one(BASE).values())


@pytest.mark.parametrize("camera", ["still", "pans left", "pans right", "zooms in", "zooms out"])
def test_cameras(camera):
    background = "night" if camera != "still" else "beach"
    shown = WorldSpec((Thing("box", "yellow", motion="spins"),), camera=camera, background=background, seed=7)
    assert all(one(shown).values())
    wrong = replace(shown, camera="still" if camera != "still" else "zooms in", background="day")
    seen = judged(shown, wrong)
    assert not seen.pop("camera") and not seen.pop("background") and all(seen.values())


@pytest.mark.parametrize("motion", ["rolls left", "stays"])
def test_who_is_in_front(motion):
    pair = (Thing("triangle", "white", motion=motion), Thing("ball", "blue"))
    behind = WorldSpec(pair, "behind", background="day", seed=3)
    front = replace(behind, relation="in front of")
    assert all(one(behind).values())
    seen = judged(behind, front)
    assert not seen.pop("relation") and all(seen.values())
    assert judged(front, behind)["relation"] is False
    apart = WorldSpec((Thing("triangle", "white"), Thing("ball", "blue")), "beside", background="day", seed=3)
    assert one(apart)["relation"] and not judged(apart, replace(apart, relation="behind"))["relation"]


def test_time_and_direction_matter():
    fall = WorldSpec((Thing("star", "purple", motion="falls"),), background="day", seed=1)
    video = video_of(fall)
    rise = replace(fall, things=(replace(fall.things[0], motion="rises"),))
    assert check_videos(video.flip(2), [rise])[0].seen["motion 1"]
    assert not check_videos(video.flip(2), [fall])[0].seen["motion 1"]
    roll = video_of(BASE)
    mirrored = replace(BASE, things=(replace(BALL, motion="rolls right"),))
    assert all(check_videos(roll.flip(4), [mirrored])[0].seen.values())


def test_what_is_left_open_is_not_judged_and_a_blank_video_shows_nothing():
    seen = judged(BASE, replace(BASE, background=None))
    assert "background" not in seen and "relation" not in seen
    blank = check_videos(torch.full((1, 3, 32, 64, 64), 0.4), [BASE])[0]
    assert not any(blank.seen[name] for name in ("colour 1", "shape 1", "size 1", "motion 1"))
    assert blank.score < 0.6 and Check({"a": True, "b": False}).score == 0.5


def test_summary_counts_kinds():
    counted = summary([Check({"shape 1": True, "shape 2": False, "nothing else": True}), Check({"shape 1": True})])
    assert counted["shape"] == pytest.approx(200 / 3) and counted["nothing_else"] == 100
    assert counted["prompt_score"] == pytest.approx((200 / 3 + 100) / 2) and counted["all_right"] == 50
    with pytest.raises(ValueError, match="checks: none"):
        summary([])


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="1 specs"):
        check_videos(torch.zeros(2, 3, 32, 64, 64), [BASE])
    with pytest.raises(ValueError, match="T >= 8"):
        check_videos(torch.zeros(1, 3, 4, 64, 64), [BASE])


def test_consistency_falls_with_flicker_and_forgives_motion():
    _, videos = painted()
    videos = videos[:2]
    generator = torch.Generator().manual_seed(0)
    flicker = (videos + 0.05 * torch.randn(videos.shape, generator=generator)).clamp(0, 1)
    shuffled = videos[:, :, torch.randperm(32, generator=generator)]
    true = consistency_db(videos)
    assert (true > consistency_db(flicker) + 5).all() and (true > consistency_db(shuffled)).all()
    still = torch.rand(1, 3, 1, 24, 24, generator=generator)
    moving = torch.cat([still.roll(step, dims=-1) for step in range(4)], dim=2)
    inside = consistency_db(moving[..., 8:20, 8:20])
    jumping = torch.cat([still.roll(5 * step, dims=-1) for step in range(4)], dim=2)
    assert float(inside) > float(consistency_db(jumping[..., 8:20, 8:20])) + 3
