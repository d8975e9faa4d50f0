import math

import pytest
import torch

from allears.diffusion.path import LinearPath
from allears.diffusion.solvers import SOLVERS, integrate, time_grid

PATH = LinearPath(0.5)


def gaussian_denoiser(mean, data_mean, data_std):
    """Posterior mean of x_0 for Gaussian data: the exact answer of a perfectly trained network."""

    def denoise(x, t):
        t = t[:, None]
        variance = ((1 - t) * data_std) ** 2 + (t * PATH.sigma) ** 2
        gain = (1 - t) * data_std**2 / variance
        return data_mean + gain * (x - (1 - t) * data_mean - t * mean)

    return denoise


def test_path_ends_and_velocity():
    torch.manual_seed(0)
    x0, mean, z = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(PATH.sample(x0, mean, torch.zeros(3), z), x0)
    torch.testing.assert_close(PATH.sample(x0, mean, torch.ones(3), z), mean + 0.5 * z)
    t = torch.tensor([0.2, 0.5, 1.0])
    x_t = PATH.sample(x0, mean, t, z)
    torch.testing.assert_close(PATH.velocity(x_t, x0, t), mean - x0 + 0.5 * z)
    torch.testing.assert_close(PATH.score(x_t, x0, mean, t), -z / (0.5 * t[:, None]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="positive"):
        LinearPath(0.0)


@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"), [("euler", 200, 0.02), ("midpoint", 12, 0.02), ("heun", 20, 0.02)]
)
def test_solvers_carry_the_prior_to_the_data(solver, steps, tolerance):
    """For Gaussian data the flow maps z to data_mean + data_std z."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    mean, data_mean, data_std = 1.5, -0.4, 0.8
    start = PATH.prior(torch.full_like(z, mean), z)
    end = integrate(gaussian_denoiser(mean, data_mean, data_std), PATH, start, time_grid(steps), SOLVERS[solver])
    torch.testing.assert_close(end, data_mean + data_std * z, atol=tolerance, rtol=0)


def test_orders_of_the_solvers():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    start = PATH.prior(torch.full_like(z, 1.5), z)
    exact = integrate(
        gaussian_denoiser(1.5, -0.4, 0.8), PATH, start, [1 - 0.8 * i / 4000 for i in range(4001)], SOLVERS["heun"]
    )
    for name, order in (("euler", 1), ("midpoint", 2), ("heun", 2)):
        gaps = [
            (
                integrate(
                    gaussian_denoiser(1.5, -0.4, 0.8),
                    PATH,
                    start,
                    [1 - 0.8 * i / n for i in range(n + 1)],
                    SOLVERS[name],
                )
                - exact
            )
            .abs()
            .max()
            for n in (20, 40)
        ]
        assert math.log2(gaps[0] / gaps[1]) > order - 0.2, name


def test_one_euler_step_is_the_prediction_itself():
    x1 = torch.randn(2, 5)
    assert torch.allclose(
        integrate(lambda x, t: torch.full_like(x, 3.0), PATH, x1, time_grid(1)), torch.full((2, 5), 3.0)
    )


def test_noise_is_seeded_and_bad_times_are_refused():
    like = torch.zeros(3, 2)
    a, b = (PATH.noise(like, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.std() > 0.1
    with pytest.raises(ValueError, match="steps"):
        time_grid(0)
    with pytest.raises(ValueError, match="falling"):
        integrate(lambda x, t: x, PATH, like, [1.0, 1.0])
