"""Audio read between its samples: the definition by hand, and the kernels, interpreted where there is no GPU."""

import math
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.ops.poison import poison_new_empty

from allears.ops.resample import Stretches, lay, read_at

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ["triton", "reference"]


@pytest.fixture(autouse=True)
def triton_is_here(request):
    if "triton" in request.node.name:
        pytest.importorskip("triton")


@pytest.fixture
def nan_filled(monkeypatch):
    """What a kernel does not write shows."""
    poison_new_empty(monkeypatch)


def noise(count, dtype=torch.int16, seed=0):
    x = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3000).round()
    return x.to(DEVICE, dtype)


def by_hand(flat, first, last, position, speed):
    """At position (N,), in double precision: all samples of the stretch that lie within 8 of it."""
    position, index = np.asarray(position)[:, None], np.arange(first, last)
    distance = index - position
    near = (index > np.floor(position) - 8) & (index < np.floor(position) + 9)
    cutoff = 0.97 / speed if speed > 1 else 1.0
    weight = cutoff * np.sinc(cutoff * distance) * np.cos(np.pi * distance / 17) ** 2
    return (near * weight) @ flat[first:last].cpu().double().numpy()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_reading_is_a_windowed_sinc_within_the_stretch(kernel, dtype, nan_filled):
    """Also before, at and behind the ends, exactly on samples and next to them."""
    flat, (first, last, speed) = noise(700, dtype), zip((100, 420, 1.0), (0, 700, 1.23), (650, 651, 0.8), strict=True)
    n = torch.arange(261, dtype=torch.float64)
    position = torch.stack([90.3 + n * 1.3, -12 + n * 2.9, 640 + n / 16])
    position[0, :3] = torch.tensor([100.0, 101.0 - 1e-9, 101.0 + 1e-9])
    ends = (torch.tensor(values, device=DEVICE) for values in (first, last))
    got = read_at(flat, *ends, position.to(DEVICE), torch.tensor(speed, device=DEVICE), kernel=kernel)
    wanted = [by_hand(flat, f, e, row, s) for f, e, row, s in zip(first, last, position, speed, strict=True)]
    assert got.shape == (3, 261) and got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), torch.from_numpy(np.stack(wanted)), atol=0.02, rtol=1e-5)
    assert got[0, 0] == flat[100] and got[2, :16].abs().max() < 1000 and got[2].abs().max() > 100


@pytest.mark.parametrize("kernel", KERNELS)
def test_places_far_from_the_recording_are_silent(kernel):
    flat = noise(50)
    ends = (torch.tensor([at], device=DEVICE) for at in (10, 40))
    position = torch.tensor([[-1e12, -9.0, 2e9, 1e15, 48.0, 49.5]], dtype=torch.float64, device=DEVICE)
    assert not read_at(flat, *ends, position, torch.ones(1, device=DEVICE), kernel=kernel).any()


def places():
    """Stretches that overlap, touch both ends, are shorter than a fade, and leave one row empty."""
    return [
        (0, 900, 3, 1, 0, 299, 1.0, 1.0),
        (0, 900, 0, 70, 2, 0, 1.0, 0.25),
        (100, 900, 150, 190, 0, 50, 1.1, 0.5),
        (300, 900, 310, 240, 0, 17, 0.83, 1.5),
        (0, 400, 200, 299, 2, 1, 1.161, 1.0),
    ]


def laid_by_hand(flat, entries, rows, frames, even_level):
    out = np.zeros((rows, frames))
    for first, last, begin, length, row, at, speed, gain in entries:
        speed, gain = float(np.float32(speed)), float(np.float32(gain))
        n = np.arange(length)
        values = by_hand(flat, first, last, begin + n * speed, speed) / 32768
        values *= np.minimum(np.minimum(n + 1, length - n) / 80, 1)
        if even_level:
            values /= max(1e-5, np.sqrt(np.square(values).mean()))
        out[row, at : at + length] += gain * values
    return torch.from_numpy(out)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("even_level", [False, True])
def test_stretches_lie_in_their_places(kernel, even_level, nan_filled):
    flat = noise(900)
    got = lay(flat, Stretches.of(places()), 3, 300, even_level, kernel=kernel)
    wanted = laid_by_hand(flat, places(), 3, 300, even_level)
    torch.testing.assert_close(got.cpu().double(), wanted, atol=3e-6, rtol=1e-5)
    assert not got[1].any() and (got[0] != 0).sum() > 230


@pytest.mark.parametrize("kernel", KERNELS)
def test_silence_has_no_level_to_bring_up_and_nothing_may_be_laid(kernel):
    flat = torch.zeros(400, dtype=torch.int16, device=DEVICE)
    silent = Stretches.of([(0, 400, 0, 200, 0, 0, 1.0, 1.0)])
    assert torch.equal(lay(flat, silent, 1, 300, True, kernel=kernel), torch.zeros(1, 300, device=DEVICE))
    assert torch.equal(lay(flat, Stretches.of([]), 2, 3, True, kernel=kernel), torch.zeros(2, 3, device=DEVICE))


def test_rows_in_order_keep_the_order_within_a_row():
    laid = Stretches.of(places()).by_row(3)
    assert laid[:4].tolist() == [0, 3, 3, 5]
    assert laid[4:].reshape(-1, 8)[:, 3].tolist() == [1, 190, 240, 70, 299]


@pytest.mark.gpu
def test_a_gpu_lays_many_stretches_alike_in_every_run():
    rng = np.random.default_rng(0)
    flat = noise(200_000)
    entries = []
    for _ in range(300):
        first, length, at = int(rng.integers(0, 100_000)), int(rng.integers(1, 5000)), int(rng.integers(0, 3000))
        speed, gain = (float(x) for x in rng.uniform(0.7, 1.4, 2))
        entries.append((first, first + 9000, first + 100, length, int(rng.integers(9)), at, speed, gain))
    stretches = Stretches.of(entries)
    for even_level in (False, True):
        first, again = (lay(flat, stretches, 9, 8000, even_level, kernel="triton") for _ in range(2))
        assert torch.equal(first, again)
        wanted = lay(flat.cpu(), stretches, 9, 8000, even_level)
        torch.testing.assert_close(first.cpu(), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0, 9, 0, 4, 0, 7, 1.0, 1.0), "of 4 samples at 7 of row 0"),
        ((0, 9, 0, 4, 2, 0, 1.0, 1.0), "at 0 of row 2"),
        ((0, 9, 0, 4, -1, 0, 1.0, 1.0), "at 0 of row -1"),
        ((0, 9, 0, 4, 0, -1, 1.0, 1.0), "at -1 of row 0"),
        ((0, 9, 0, 0, 0, 0, 1.0, 1.0), "of 0 samples"),
        ((0, 9, 0, 4, 0, 0, 0.0, 1.0), "at speed 0, given"),
        ((0, 9, 0, 4, 0, 0, math.nan, 1.0), "at speed nan"),
    ],
)
def test_stretches_that_do_not_fit_are_told(change, said):
    good = (0, 9, 0, 10, 1, 0, 1.0, 1.0)
    with pytest.raises(ValueError, match=f"stretches: .*{said}.* wanted 1 sample or more, within 2 rows of 10"):
        lay(noise(9), Stretches.of([good, change]), 2, 10)


def test_what_a_kernel_does_not_do_is_refused():
    ends, position, speed = (
        (torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)),
        torch.zeros(1, 2),
        1.0,
    )
    ends, position, speed = [x.to(DEVICE) for x in ends], position.double().to(DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=r"shapes \(9,\), \(1,\), \(1,\), \(2,\), \(1,\) given"):
        read_at(noise(9), *ends, position[0], speed)
    with pytest.raises(ValueError, match=r"flat: shape \(3, 3\)"):
        lay(noise(9).reshape(3, 3), Stretches.of([]), 1, 1)
    with pytest.raises(ValueError, match="kernel: 'cuda' given; known are auto, triton, reference"):
        read_at(noise(9), *ends, position, speed, kernel="cuda")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"takes contiguous int16 and float32.* torch.float64"):
        read_at(noise(9, torch.float64), *ends, position, speed, kernel="triton")
    with pytest.raises(ValueError, match="takes contiguous"):
        read_at(noise(18)[::2], *ends, position, speed, kernel="triton")
    with pytest.raises(ValueError, match="70000 given"):
        lay(noise(9), Stretches.of([]), 70_000, 1, kernel="triton")
    with pytest.raises(ValueError, match="no backward"):
        read_at(noise(9, torch.float32).requires_grad_(), *ends, position, speed, kernel="triton")
