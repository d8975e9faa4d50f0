import math

import pytest
import torch

from allears.data.world import COLOURS, MOTIONS, SHAPES, Thing, WorldSpec, draw_specs
from allears.data.world_features import FEATURES, WorldClassifier, frechet_distance, targets
from allears.data.world_render import render


def test_frechet_distance_of_gaussians_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T  # exactly white
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 3.0, -1.0])
    wanted = 10.0 + float((scale - 1).square().sum())
    assert frechet_distance(base, base * scale + shift) == pytest.approx(wanted, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    assert frechet_distance(base @ turn, (base * scale + shift) @ turn) == pytest.approx(wanted, abs=1e-6)
    assert frechet_distance(base, base) == pytest.approx(0, abs=1e-6)
    few = frechet_distance(base[:2], base[2:4])
    assert math.isfinite(few) and few >= -1e-6
    with pytest.raises(ValueError, match="a, b"):
        frechet_distance(base, base[:, :2])


def test_targets_say_what_is_there():
    spec = WorldSpec((Thing("star", "green", "big", "falls"), Thing("box", "red")), "beside", "zooms in", "night")
    found = targets([spec, WorldSpec((Thing("ball", "white"),), background="room")])
    green, red = tuple(COLOURS).index("green"), tuple(COLOURS).index("red")
    assert found["colour"][0].nonzero()[:, 0].tolist() == sorted([green, red])
    assert SHAPES[found["shape"][0, green]] == "star" and MOTIONS[found["motion"][0, red]] == "stays"
    assert int((found["size"][1] >= 0).sum()) == 1
    assert found["relation"].tolist() == [2, 0] and found["camera"].tolist() == [3, 0]
    assert found["background"].tolist() == [1, 0]


def test_each_colour_looks_where_it_is():
    torch.manual_seed(0)
    net = WorldClassifier(width=4)
    with torch.no_grad():
        places = []
        for corner in (0, 44):
            video = torch.full((1, 3, 8, 64, 64), 0.3)
            red, blue = (torch.tensor(COLOURS[name]).view(3, 1, 1, 1) / 255 for name in ("red", "blue"))
            video[0, :, :, corner : corner + 20, 44:] = red
            video[0, :, :, 20:40, :20] = blue
            found = net._found(torch.zeros(1, 16, 4, 16, 16), video).unflatten(2, (8, 19))[0, :, :, 16:18].mean(1)
            places.append(found)
    names = tuple(COLOURS)
    up, down = (place[names.index("red")] for place in places)
    assert up[0] < -0.6 and down[0] > 0.6 and min(up[1], down[1]) > 0.6  # row and column, -1 to 1
    assert float(places[0][names.index("blue")][1]) < -0.6
    assert float(places[0][names.index("green")].abs().max()) < 0.3  # not there: it looks everywhere


def test_the_classifier_learns():
    torch.manual_seed(0)
    net = WorldClassifier(width=4)
    specs = draw_specs(6, 0)
    videos, wanted = render(specs, frames=8, size_px=16), targets(specs)
    with torch.no_grad():
        features = net(videos)
    assert features.shape == (6, FEATURES) and float(features.abs().max()) <= 1
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(18):
        loss, right = net.loss(videos, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0] and float(right["colour"]) > 0.8
