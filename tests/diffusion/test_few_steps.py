import math

import pytest
import torch
from gaussian_flow import GaussianFlow

from allears.core.weights import load_weights, save_weights
from allears.diffusion.few_steps import PAPER_MIDDLE_RAD, few_step_angles, sample_few
from allears.diffusion.merge import merge_deltas, merge_files

WORLD = GaussianFlow(0.7, 0.4)


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_published_angles():
    assert few_step_angles(4) == (math.atan(80), 1.5, 1.4, 1.0, 0.0)
    assert few_step_angles(2, 1600, PAPER_MIDDLE_RAD) == (math.atan(1600), 1.3, 0.0)
    assert few_step_angles(1, math.inf) == (math.pi / 2, 0.0)


def test_one_step_is_the_consistency_function():
    z = noise(50)
    out = sample_few(WORLD.consistent, z, None, few_step_angles(1, math.inf))
    torch.testing.assert_close(out, WORLD.mean + WORLD.scale * z)


@pytest.mark.parametrize("steps", [2, 4])
def test_sde_keeps_the_distribution(steps):
    """Fresh noise on exact samples, and back: still the data."""
    rng = torch.Generator().manual_seed(1)
    out = sample_few(WORLD.consistent, noise(20_000), None, few_step_angles(steps, math.inf), "sde", rng)
    assert float(out.mean()) == pytest.approx(0.7, abs=0.01) and float(out.std()) == pytest.approx(0.4, abs=0.01)
    again = sample_few(
        WORLD.consistent, noise(20_000), None, few_step_angles(steps, math.inf), generator=rng.manual_seed(1)
    )
    assert torch.equal(out, again)


def test_ode_is_a_solver_of_first_order():
    """With the teacher's velocity it comes to where the flow leads; half the step, half the error."""
    z = noise(50)
    errors = []
    for steps in (200, 400):
        angles = [math.pi / 2 * (1 - index / steps) for index in range(steps)] + [0.0]
        out = sample_few(WORLD.velocity, z, None, angles, "ode")
        errors.append(float((out - (WORLD.mean + WORLD.scale * z)).norm()))
    assert errors[1] < 0.03 and errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_start_has_the_scale_of_its_level():
    seen = []
    sample_few(lambda x, t, c: seen.append((x, t, c)) or x, noise(3), "words", few_step_angles(1, 3.0), "ode")
    x, t, condition = seen[0]
    assert condition == "words" and float(t[0]) == pytest.approx(0.75)
    torch.testing.assert_close(x, noise(3) * math.hypot(0.75, 0.25))


def test_bad_samplers_are_named():
    for call, words in (
        (lambda: few_step_angles(5), "steps: 5 given; with 3 angles"),
        (lambda: few_step_angles(3, 80, (0.5, 1.0)), "must fall"),
        (lambda: sample_few(WORLD.velocity, noise(2), None, (1.0, 0.5)), "angles_rad"),
        (lambda: sample_few(WORLD.velocity, noise(2), None, (2.0, 0.0)), "angles_rad"),
        (lambda: sample_few(WORLD.velocity, noise(2), None, (1.0, 0.0), "euler"), "kind: 'euler' given"),
        (lambda: sample_few(WORLD.velocity, noise(2), None, (1.0, 0.5, 0.0)), "generator: None given"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def states() -> tuple[dict[str, torch.Tensor], ...]:
    base = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor([3])}
    distilled = {"w": torch.tensor([1.5, 2.0]), "n": torch.tensor([3])}
    sparse = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor([3]), "router": torch.tensor([7.0])}
    return base, distilled, sparse


def test_merge_adds_both_changes_and_copies_what_is_new():
    base, distilled, sparse = states()
    merged = merge_deltas(base, [distilled, sparse])
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {"w": [1.5, 4.0], "n": [3], "router": [7.0]}
    assert merge_deltas(base, [distilled, sparse], [1.0, 0.5])["w"].tolist() == [1.5, 3.0]
    assert all(torch.equal(merge_deltas(base, [distilled])[name], distilled[name]) for name in base)


def test_merge_rounds_once():
    base = {"w": torch.tensor([1.0, 300.0], dtype=torch.bfloat16)}
    small = {"w": torch.tensor([1.00390625, 300.0], dtype=torch.float32)}
    assert merge_deltas(base, [small, small])["w"].tolist() == [1.0078125, 300.0]


def test_merge_of_files(tmp_path):
    for name, state in zip(("base", "distilled", "sparse"), states(), strict=True):
        save_weights(tmp_path / name, state, {"model": name}, dtype="float32")
    merge_files(tmp_path / "base", [tmp_path / "distilled", tmp_path / "sparse"], tmp_path / "both")
    tensors, record = load_weights(tmp_path / "both")
    assert tensors["w"].tolist() == [1.5, 4.0]
    assert record["model"] == "distilled" and [part["weight"] for part in record["merged"]] == [1.0, 1.0]


def test_models_that_do_not_belong_together_are_named():
    base, distilled, sparse = states()
    for tuned, weights, words in (
        ([], None, "weights: 0 given for 0 models"),
        ([distilled], [1.0, 1.0], "weights: 2 given for 1 models"),
        ([{"n": base["n"]}], None, r"tuned\[0\]: lacks 'w'"),
        ([distilled, {**sparse, "w": torch.zeros(3)}], None, r"tuned\[1\]: 'w' is \(3,\)"),
        ([{**distilled, "n": torch.tensor([4])}], None, r"tuned\[0\]: 'n' holds torch.int64"),
        ([sparse, sparse], None, r"tuned\[1\]: 'router' is not in the base"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_deltas(base, tuned, weights)
