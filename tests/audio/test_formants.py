import math

import numpy as np
import pytest
import torch

from allears.audio.formants import LIMIT_DB, predictor, shift_formants

FORMANTS_HZ = (600.0, 1500.0, 2500.0)
RESONANCES = (*zip(FORMANTS_HZ, (80.0, 110.0, 150.0), strict=True), (3500.0, 220.0), (4600.0, 300.0), (5700.0, 400.0))


def response(hertz, ratio=1.0):
    """Magnitude of resonances in a row at harmonics that fall by 6 dB an octave, all read at hertz / ratio."""
    s = 2j * np.pi * np.asarray(hertz) / ratio
    total = ratio / np.asarray(hertz)
    for centre, width in RESONANCES:
        pole = complex(-np.pi * width, 2 * np.pi * centre)
        total = total * np.abs(pole) ** 2 / ((s - pole) * (s - pole.conjugate()))
    return total


def vowel(pitch_hz, rate=16_000, seconds=0.5):
    harmonics = np.arange(1, int(min(7600, 0.475 * rate) / pitch_hz) + 1) * pitch_hz
    time = np.arange(int(seconds * rate)) / rate
    sound = (response(harmonics)[:, None] * np.exp(2j * np.pi * harmonics[:, None] * time)).sum(0).real
    hiss = 1e-4 * np.random.default_rng(0).standard_normal(len(time))
    return torch.from_numpy(0.3 * sound / np.abs(sound).max() + hiss).float()


def harmonic_levels_db(x, pitch_hz, rate=16_000):
    x = x[rate // 12 : -rate // 12].double().numpy()
    harmonics = np.arange(1, int(3000 / pitch_hz) + 1) * pitch_hz
    tones = np.exp(-2j * np.pi * harmonics[:, None] * np.arange(len(x)) / rate)
    return harmonics, 20 * np.log10(np.abs((x * np.hanning(len(x)) * tones).sum(-1)))


def formants_hz(x, rate=16_000, order=16):
    """Sharp poles of linear prediction over the whole signal."""
    x = np.convolve(x.double().numpy(), [1, -0.97])
    correlation = np.array([x[: len(x) - lag] @ x[lag:] for lag in range(order + 1)])
    lags = np.abs(np.arange(order)[:, None] - np.arange(order))
    roots = np.roots([1, *-np.linalg.solve(correlation[lags], correlation[1:])])
    return np.sort(np.angle(roots[(roots.imag > 0) & (np.abs(roots) > 0.9)]) * rate / (2 * np.pi))


def pitch_hz(x, rate=16_000):
    power = np.abs(np.fft.rfft(x.double().numpy(), 2 * len(x))) ** 2
    correlation = np.fft.irfft(power)[: rate // 50]
    low = rate // 400
    return rate / (low + correlation[low:].argmax())


@pytest.mark.parametrize("ratio", [0.84, 0.93, 1.19])
def test_resonances_of_a_vowel_move_and_its_pitch_stays(ratio):
    x = vowel(120)
    wanted = np.array(FORMANTS_HZ)
    np.testing.assert_allclose(formants_hz(x)[:3], wanted, rtol=0.03)
    y = shift_formants(x, ratio)
    np.testing.assert_allclose(formants_hz(y)[:3], ratio * wanted, rtol=0.05)
    assert pitch_hz(x) == pytest.approx(120, rel=0.01) and pitch_hz(y) == pitch_hz(x)


@pytest.mark.parametrize(("pitch", "worst_db"), [(100, 1.5), (160, 1.6), (230, 2.6)])
@pytest.mark.parametrize("ratio", [0.84, 1.19])
def test_each_harmonic_has_the_level_of_the_moved_resonances(pitch, worst_db, ratio):
    x = vowel(pitch)
    harmonics, before = harmonic_levels_db(x, pitch)
    change = 20 * np.log10(np.abs(response(harmonics, ratio) / response(harmonics)))
    after = harmonic_levels_db(shift_formants(x, ratio), pitch)[1]
    error = after - before - change
    assert np.std(error) < worst_db
    assert np.std(error) < 0.4 * np.std(change)  # the error of doing nothing


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
def test_other_rates(rate):
    x = vowel(110, rate)
    harmonics, before = harmonic_levels_db(x, 110, rate)
    change = 20 * np.log10(np.abs(response(harmonics, 0.9) / response(harmonics)))
    after = harmonic_levels_db(shift_formants(x, 0.9, rate), 110, rate)[1]
    assert np.std(after - before - change) < 0.6 * np.std(change)


def noises(rows, length):
    return 0.1 * torch.randn(rows, length, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("length", [1, 127, 128, 1000, 4001])
def test_ratio_1_gives_the_input_back_and_levels_stay(length):
    x = noises(3, length) * torch.tensor([[1.0], [1e-3], [5.0]])
    torch.testing.assert_close(shift_formants(x, 1.0), x, atol=2e-6, rtol=1e-5)
    y = shift_formants(x, torch.tensor([0.8, 1.0, 1.3]))
    assert y.shape == x.shape and y.dtype == torch.float32
    torch.testing.assert_close(y.square().mean(-1), x.square().mean(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(y[1], x[1], atol=2e-6, rtol=1e-5)
    if length > 1:
        assert (y[2] - x[2]).abs().max() > 0.1


def test_rows_do_not_touch_each_other():
    x = torch.stack([vowel(120)[:3000], noises(1, 3000)[0], torch.zeros(3000), vowel(220)[:3000]])
    ratio, top = torch.tensor([0.84, 1.1, 0.9, 1.2]), torch.tensor([8000.0, 4000.0, 8000.0, 7000.0])
    together = shift_formants(x, ratio, top_hz=top)
    for row in range(4):
        alone = shift_formants(x[row], float(ratio[row]), top_hz=float(top[row]))
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)
    assert not together[2].any()


def test_nothing_breaks_and_silence_stays():
    click, faint, loud = torch.zeros(3, 2000)
    click[700] = 1.0
    faint += 1e-12 * noises(1, 2000)[0]
    loud += 1e4 * torch.sign(noises(1, 2000)[0])
    tone = torch.sin(0.3 * torch.arange(2000.0))
    half = noises(1, 2000)[0]
    half[1000:] = 0
    x = torch.stack([click, faint, loud, tone, half, torch.ones(2000), torch.zeros(2000)])
    for ratio in (0.5, 0.82, 1.22, 2.0):
        y = shift_formants(x, ratio)
        assert torch.isfinite(y).all() and not y[-1].any()
        assert not y[4, 1600:].any()
        torch.testing.assert_close(y.square().mean(-1), x.square().mean(-1), rtol=1e-3, atol=0)


def test_nothing_changes_above_the_top_and_gains_are_limited():
    x = noises(1, 8000)[0]
    before = torch.fft.rfft(x).abs()
    after = torch.fft.rfft(shift_formants(x, 1.2, top_hz=2000.0)).abs()
    above = (after / before)[1100:]  # 2 Hz a bin; only the level of the whole differs
    assert float(above.quantile(0.95) / above.quantile(0.05)) < 1.05
    assert float((after / before)[200:800].std()) > 0.2


def test_a_cliff_of_40_db_is_moved_by_gains_up_to_the_limit():
    x = noises(1, 16_000)[0]
    spectrum = torch.fft.rfft(x)
    spectrum[3000:] *= 1e-2
    x = torch.fft.irfft(spectrum)
    change = (torch.fft.rfft(shift_formants(x, 1.4)).abs() / torch.fft.rfft(x).abs()).log10() * 20
    rise = float(change[3300:4000].median() - change[500:2500].median())
    assert LIMIT_DB - 3 < rise < LIMIT_DB + 1


def test_autocast_changes_nothing():
    x, ratio = noises(2, 2000), torch.tensor([0.9, 1.2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shift_formants(x, ratio), shift_formants(x.clone(), ratio))
        inside = shift_formants(x, ratio)
    assert torch.equal(inside, shift_formants(x, ratio))


def test_predictor_solves_the_normal_equations():
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    correlation = torch.fft.irfft(torch.fft.rfft(x, n=256).abs().square())[..., :9]
    taps = predictor(correlation)
    lags = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    wanted = -torch.linalg.solve(correlation[..., lags], correlation[..., 1:])
    torch.testing.assert_close(taps[..., 1:], wanted)
    assert (taps[..., 0] == 1).all() and torch.equal(predictor(correlation[..., :1]), torch.ones(5, 7, 1).double())


def test_gradients_flow():
    x = noises(1, 1000).requires_grad_()
    shift_formants(x, 1.1).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("x", "ratio", "more", "said"),
    [
        (torch.zeros(2, 3, 4), 1.1, {}, "x: got"),
        (torch.zeros(4, dtype=torch.int16), 1.1, {}, "x: got torch.int16"),
        (torch.zeros(2, 0), 1.1, {}, "x: got"),
        (torch.zeros(2, 9), 0.0, {}, "ratio: got 0.0"),
        (torch.zeros(2, 9), math.nan, {}, "ratio: got nan"),
        (torch.zeros(2, 9), torch.ones(3), {}, r"ratio: got shape \(3,\), wanted one number or one a row, \(2,\)"),
        (torch.zeros(2, 9), 1.1, {"top_hz": -1.0}, "top_hz: got -1.0"),
        (torch.zeros(2, 9), 1.1, {"sample_rate_hz": 2000}, "sample_rate_hz: got 2000"),
    ],
)
def test_wrong_arguments_are_told(x, ratio, more, said):
    with pytest.raises(ValueError, match=said):
        shift_formants(x, ratio, **more)
