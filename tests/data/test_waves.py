"""What renderers share. Shapes: (R, T)."""

import math

import numpy as np
import pytest
import torch
from banks import bank_of

from allears.data import waves
from allears.data.segments import Segment, Synthetic

CPU = torch.device("cpu")
SPECS = [
    Synthetic(3, -6.0, 50.0, -3.0),
    Synthetic(4, 2.5),
    Synthetic(5, 0.0, 133.7, -12.0),
    Synthetic(6, -9.0, 0.0, 1.0),
]


def noise_by_hand(spec, frames):
    generator = torch.Generator().manual_seed(spec.seed)
    white = torch.randn(frames, generator=generator).double().numpy()
    hertz = np.maximum(np.fft.rfftfreq(frames, 1 / 16_000), 20.0)
    x = np.fft.irfft(np.fft.rfft(white) * (hertz / 1000) ** (spec.slope_db / 6.02), n=frames)
    x = x / np.sqrt(np.square(x).mean())
    if spec.hum_hz:
        phases = torch.rand(8, generator=generator).double().numpy() * 2 * math.pi
        time = np.arange(frames) / 16_000
        x = 0.5 * x + sum(np.sin(2 * math.pi * spec.hum_hz * k * time + phases[k - 1]) / k for k in range(1, 9))
        x = x / np.sqrt(np.square(x).mean())
    return torch.from_numpy(x * 10 ** (spec.gain_db / 20))


@pytest.mark.parametrize("frames", [801, 6000])
def test_made_noise_is_the_formula_alone_and_all_at_once(frames):
    """As a CPU makes it, a row at a time, and as a GPU does."""
    wanted = torch.stack([noise_by_hand(spec, frames) for spec in SPECS])
    rows = waves.made_noise([None, *SPECS[:2], None, *SPECS[2:]], frames, CPU)
    assert rows.shape == (6, frames) and rows.dtype == torch.float32 and not rows[[0, 3]].any()
    torch.testing.assert_close(rows[[1, 2, 4, 5]].double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(waves._noises(SPECS, frames, CPU).double(), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(waves.made_noise([SPECS[2]], frames, CPU)[0], rows[4])
    assert not waves.made_noise([None, None], frames, CPU).any()


def test_made_noise_is_what_it_was():
    """Rendered test sets hang on it."""
    x = waves.made_noise([Synthetic(7, -4.5, 60.0, -2.0)], 4000, CPU)[0]
    wanted = torch.tensor([1.6954727, 0.5847762, -0.4172797, 1.8924667])
    torch.testing.assert_close(x[[0, 999, 2500, 3999]], wanted, atol=1e-6, rtol=0)


def test_segments_lie_at_their_gains_and_levels_whatever_their_order():
    bank = bank_of([3000, 5000], ["speech"] * 2)
    placed = [(1, Segment("i1", 100, 50, 2000, -6.0)), (0, Segment("i0", 0, 0, 1500)), (1, Segment("i0", 9, 2500, 400))]
    flat = torch.from_numpy(bank.audio)
    out = waves.lay_segments(placed, bank, flat, 2, 3000, even_level=False)
    for row, segment in placed:
        inner = slice(segment.at + 80, segment.at + segment.length - 80)
        wanted = torch.from_numpy(bank.crop(bank.index_of(segment.item), segment.start + 80, segment.length - 160))
        torch.testing.assert_close(out[row, inner], wanted * 10 ** (segment.gain_db / 20), atol=1e-6, rtol=1e-6)
    assert not out[0, 1500:].any() and not out[1, :50].any() and not out[1, 2050:2500].any()
    assert torch.equal(out, waves.lay_segments(placed[::-1], bank, flat, 2, 3000, even_level=False))
    even = waves.lay_segments(placed, bank, flat, 2, 3000, even_level=True)
    levels = [even[row, s.at : s.at + s.length].square().mean().sqrt() for row, s in placed]
    torch.testing.assert_close(torch.stack(levels), torch.tensor([10 ** (-6 / 20), 1.0, 1.0]), atol=1e-5, rtol=1e-5)


def test_a_segment_that_reaches_beyond_its_clip_is_told():
    bank = bank_of([3000], ["speech"])
    with pytest.raises(ValueError, match="one of 200 samples at 900 of row 0"):
        waves.lay_segments([(0, Segment("i0", 0, 900, 200))], bank, torch.from_numpy(bank.audio), 1, 1000, False)
