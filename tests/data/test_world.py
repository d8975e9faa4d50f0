import dataclasses

import numpy as np
import pytest
import torch

from allears.data.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Thing,
    WorldSpec,
    draw_spec,
    draw_specs,
    is_held_out,
)
from allears.data.world_layout import HORIZON, lay_out
from allears.data.world_render import outline, render

RED_BALL = Thing("ball", "red")


def test_the_same_seed_gives_the_same_specs_and_splits_do_not_share_a_triple():
    assert draw_specs(40, 3) == draw_specs(40, 3) != draw_specs(40, 4)
    assert not any(is_held_out(thing) for spec in draw_specs(200, 0) for thing in spec.things)
    assert all(any(map(is_held_out, spec.things)) for spec in draw_specs(60, 0, "test"))
    triples = [is_held_out(Thing(s, c, motion=m)) for s in SHAPES for c in COLOURS for m in MOTIONS]
    assert 0.07 < sum(triples) / len(triples) < 0.14
    for kind, known in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS)):  # none is held out as a whole
        for value in known:
            held = [
                is_held_out(Thing(s, c, motion=m))
                for s in SHAPES
                for c in COLOURS
                for m in MOTIONS
                if {"shape": s, "colour": c, "motion": m}[kind] == value
            ]
            assert 0 < sum(held) < len(held) / 3, (kind, value)


def test_drawn_specs_show_everything():
    specs = draw_specs(400, 1)
    assert {spec.background for spec in specs} == set(BACKGROUNDS)
    assert {spec.relation for spec in specs} == {None, "and", "beside", "behind", "in front of"}
    assert {spec.camera for spec in specs} == {"still", "pans left", "pans right", "zooms in", "zooms out"}
    assert {thing.motion for spec in specs for thing in spec.things} == set(MOTIONS)
    assert {thing.size for spec in specs for thing in spec.things} == set(SIZES)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Thing("cube", "red"), "shape: 'cube' is unknown"),
        (lambda: Thing("ball", "pink"), "colour: 'pink'"),
        (lambda: Thing("ball", "red", "vast"), "size: 'vast'"),
        (lambda: Thing("ball", "red", motion="flies"), "motion: 'flies'"),
        (lambda: WorldSpec(()), "things: 0 given"),
        (lambda: WorldSpec((RED_BALL,), "behind"), "one thing"),
        (lambda: WorldSpec((RED_BALL, Thing("box", "blue"))), "relation: None"),
        (lambda: WorldSpec((RED_BALL, Thing("box", "red")), "and"), "different colours"),
        (lambda: WorldSpec((RED_BALL, Thing("box", "blue", motion="falls")), "behind"), "it stays"),
        (lambda: WorldSpec((Thing("ball", "red", motion="spins"), Thing("box", "blue")), "behind"), "hides its turn"),
        (lambda: WorldSpec((RED_BALL,), camera="tilts"), "camera: 'tilts'"),
        (lambda: WorldSpec((RED_BALL,), background="moon"), "background: 'moon'"),
        (lambda: draw_spec(np.random.default_rng(0), "val"), "split: 'val'"),  # type: ignore[arg-type]
        (lambda: lay_out([], 8), "specs, frames"),
        (lambda: render([WorldSpec((RED_BALL,))], size_px=4), "size_px: 4"),
    ],
)
def test_what_is_wrong_is_named(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_the_seed_alone_chooses_what_is_left_open():
    spec = WorldSpec((RED_BALL,), seed=9)
    chosen = spec.with_background()
    assert chosen.background in BACKGROUNDS and chosen == spec.with_background()
    assert torch.equal(render([spec], frames=4, size_px=16), render([chosen], frames=4, size_px=16))
    others = {dataclasses.replace(spec, seed=seed).with_background().background for seed in range(30)}
    assert others == set(BACKGROUNDS)


@pytest.mark.parametrize(
    ("motion", "dx", "dy"),
    [("rolls left", -1, 0), ("rolls right", 1, 0), ("falls", 0, 1), ("rises", 0, -1), ("stays", 0, 0), ("spins", 0, 0)],
)
def test_things_go_where_their_motion_says(motion, dx, dy):
    layout = lay_out([WorldSpec((Thing("ball", "red", motion=motion),), seed=seed) for seed in range(4)], 16)
    moved_x, moved_y = (path[:, 0, -1] - path[:, 0, 0] for path in (layout.x, layout.y))
    assert torch.equal(moved_x.sign(), torch.full((4,), float(dx))) and (moved_x.abs() > 0.4).all() == bool(dx)
    assert torch.equal(moved_y.sign(), torch.full((4,), float(dy))) and (moved_y.abs() > 0.4).all() == bool(dy)
    turned = (layout.angle[:, 0, -1] - layout.angle[:, 0, 0]).abs()
    assert ((turned > 2.5) == (motion in ("spins", "rolls left", "rolls right"))).all()
    if dx:  # a wheel that does not slip
        torch.testing.assert_close(
            layout.angle[:, 0] * layout.radius[:, :1],
            layout.x[:, 0] - layout.x[:, 0].mean(1)[:, None],
            atol=1e-3,
            rtol=0,
        )


@pytest.mark.parametrize(("shape", "area"), [("ball", np.pi), ("box", 4 * 0.84**2), ("triangle", 3 * 3**0.5 * 0.62**2)])
def test_outlines_hold_their_area(shape, area):
    grid = (torch.arange(400) + 0.5) / 100 - 2
    inside = outline(shape, grid[None], grid[:, None]) < 0
    assert float(inside.float().sum()) / 1e4 == pytest.approx(area, rel=0.01)


def test_the_star_has_five_tips_and_points_up():
    angles = torch.arange(360) * torch.pi / 180
    outside = outline("star", 0.9 * angles.sin(), -0.9 * angles.cos()) > 0
    assert int((outside[1:] != outside[:-1]).sum()) == 10 and not bool(outside[0])
    x, y = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor(2 * torch.pi / 5)
    torch.testing.assert_close(
        outline("star", x, y),
        outline("star", x * turn.cos() - y * turn.sin(), y * turn.cos() + x * turn.sin()),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_painted_ball_has_its_place_colour_and_area():
    spec = WorldSpec((Thing("ball", "blue", "big"),), background="beach", seed=2)
    video, layout = render([spec], size_px=96, frames=4)[0], lay_out([spec], 4)
    assert video.shape == (3, 4, 96, 96) and float(video.min()) >= 0 and float(video.max()) <= 1
    blueness = (video[2] - video[0]).clamp(min=0)
    covered = (blueness > 0.15).float()
    radius = float(layout.radius[0, 0])
    assert float(covered[0].mean()) == pytest.approx(np.pi * radius**2, rel=0.06)
    rows = (torch.arange(96) + 0.5) / 96
    middle = (covered[0].sum(1) * rows).sum() / covered[0].sum(), (covered[0].sum(0) * rows).sum() / covered[0].sum()
    assert float(middle[0]) == pytest.approx(float(layout.y[0, 0, 0]), abs=0.01)
    assert float(middle[1]) == pytest.approx(float(layout.x[0, 0, 0]), abs=0.01)


def test_the_camera_moves_the_picture_the_other_way_and_a_zoom_magnifies():
    things = (Thing("box", "red", "small"),)
    right = lay_out([WorldSpec(things, camera="pans right", background="room", seed=3)], 8)
    video = render(right, size_px=64)[0]
    moved_px = float(right.pan[0, 1] - right.pan[0, 0]) * 64
    before, after = video[:, 0, 4], video[:, 1, 4]  # a row of the wall
    grid = torch.arange(20, 40)
    low = (grid + moved_px).floor().long()
    part = (grid + moved_px) - low
    shown = torch.lerp(before[:, low], before[:, low + 1], part)
    torch.testing.assert_close(after[:, 20:40], shown, atol=4e-3, rtol=0)
    assert (after[:, 20:40] - before[:, 20:40]).abs().max() > 0.01
    closer = render([WorldSpec(things, camera="zooms in", background="room", seed=3)], frames=8)[0]
    red = ((closer[0] - closer[2]) > 0.3).float().mean((1, 2))
    assert float(red[-1] / red[0]) == pytest.approx(1.55**2, rel=0.2)


def test_what_is_in_front_covers_what_is_behind():
    pair = (Thing("box", "green", motion="rolls left"), Thing("ball", "white", "big"))
    for relation, covers in (("behind", "white"), ("in front of", "green")):
        spec = WorldSpec(pair, relation, background="night", seed=1)
        video, layout = render([spec], frames=9)[0], lay_out([spec], 9)
        slot = int(layout.slot[0, 0])  # of the box
        x, y = (int(64 * float(path[0, slot, 4])) for path in (layout.x, layout.y))
        pixel = video[:, 4, y, x]
        assert (float(pixel[0]) > 0.5) == (covers == "white")


def test_batches_and_chunks_do_not_change_a_video():
    specs = draw_specs(18, 5)
    together = render(specs, frames=3, size_px=16)
    for index in (0, 15, 16, 17):
        torch.testing.assert_close(render([specs[index]], frames=3, size_px=16)[0], together[index])
    above = render(specs[:2], frames=3, size_px=32)[:, :, :, : int(32 * HORIZON) - 6]
    assert above.shape[3] == 13 and float(above.std()) > 0
