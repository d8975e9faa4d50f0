"""Simulated rooms against pyroomacoustics, against geometry, and against reverberation formulas."""

import json
import math

import numpy as np
import pytest
import torch

from allears.audio import image_source
from allears.audio.rooms import (
    Room,
    RoomRanges,
    absorption_for_rt60,
    decay_curve_db,
    direct_delay,
    early_part,
    image_source_rir,
    random_room,
    rt60_of,
)

RATE = 16000
ROOM = Room((5.0, 4.0, 3.0), (0.3, 0.5, 0.2, 0.4, 0.6, 0.25), (1.1, 2.2, 1.3), ((3.3, 1.2, 1.7), (3.35, 1.25, 1.7)))


def peer_rir(room, max_order):
    """pyroomacoustics' responses at our scale (it leaves 4 pi out) and without its common delay of 40 samples."""
    pra = pytest.importorskip("pyroomacoustics")
    walls = dict(zip(("west", "east", "south", "north", "floor", "ceiling"), room.absorption, strict=True))
    old = pra.constants.get("rir_hpf_enable")
    pra.constants.set("rir_hpf_enable", False)
    try:
        materials = {name: pra.Material(share) for name, share in walls.items()}
        peer = pra.ShoeBox(room.size_m, fs=RATE, materials=materials, max_order=max_order, air_absorption=False)
        peer.add_source(room.source_m)
        peer.add_microphone_array(np.array(room.mics_m).T)
        peer.compute_rir()
    finally:
        pra.constants.set("rir_hpf_enable", old)
    length = min(len(response[0]) for response in peer.rir)
    return torch.tensor(np.stack([response[0][40:length] for response in peer.rir])).float() / (4 * math.pi)


@pytest.mark.parametrize("max_order", [0, 1, 2, 6])
def test_equals_pyroomacoustics_with_exact_delays(max_order):
    want = peer_rir(ROOM, max_order)
    got = image_source_rir([ROOM], RATE, want.shape[-1] / RATE, max_order=max_order, exact_ms=1e4, highpass_hz=0)[0]
    # What is left is the peer's fractional delay, which it reads from a table of 20 steps a sample.
    assert torch.linalg.norm(got - want) < 5e-3 * torch.linalg.norm(want)


def test_decay_curve_equals_that_of_pyroomacoustics():
    room = Room.with_rt60((4.0, 3.5, 2.7), 0.3, (1.0, 2.0, 1.5), ((3.0, 1.0, 1.2),))
    want = peer_rir(room, 24)[0]
    got = image_source_rir([room], RATE, len(want) / RATE, max_order=24, highpass_hz=0)[0, 0]
    ours, theirs = decay_curve_db(got), decay_curve_db(want)
    audible = theirs > -40
    assert (ours - theirs)[audible].abs().max() < 0.2
    torch.testing.assert_close(rt60_of(got, RATE), rt60_of(want, RATE), rtol=0.01, atol=0)


def test_direct_path_has_the_delay_and_strength_of_its_distance():
    room = Room((5.0, 4.0, 3.0), (1.0,) * 6, (1.0, 1.0, 1.0), ((1.0 + 100 * 343 / RATE, 1.0, 1.0),))  # 100 samples away
    rir = image_source_rir([room], RATE, 0.05, highpass_hz=0)[0, 0]
    assert rir[100] == pytest.approx(1 / (4 * math.pi * 100 * 343 / RATE), rel=1e-5)
    rir[100] = 0
    assert rir.abs().max() < 1e-6


def test_late_images_are_as_exact_as_documented():
    room = Room.with_rt60((5.0, 4.0, 3.0), 0.3, (1.1, 2.2, 1.3), ((3.3, 1.2, 1.7),))
    exact = image_source_rir([room], RATE, 0.3, exact_ms=1e4, highpass_hz=0)[0, 0]
    fast = image_source_rir([room], RATE, 0.3, exact_ms=50, highpass_hz=0)[0, 0]
    first = RATE // 20
    torch.testing.assert_close(fast[: first - 41], exact[: first - 41], atol=1e-7, rtol=0)
    error, signal = torch.fft.rfft((fast - exact)[first:]).abs(), torch.fft.rfft(exact[first:]).abs()
    bins = len(error)
    for low, high in [(0.05, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.95)]:
        band = slice(int(low * bins), int(high * bins))
        ratio = error[band].square().sum().sqrt() / signal[band].square().sum().sqrt()
        assert ratio < math.pi / 4 * high / 2  # the stated bound at the band's upper end
        energy = band_energy(fast[first:], band) / band_energy(exact[first:], band)
        assert 10 * abs(math.log10(energy)) < 0.3


def band_energy(x, band):
    return torch.fft.rfft(x).abs()[band].square().sum().item()


def test_the_size_of_blocks_does_not_matter(monkeypatch):
    want = image_source_rir([ROOM], RATE, 0.2)
    monkeypatch.setattr(image_source, "_BLOCK", {"cpu": 1 << 8})
    torch.testing.assert_close(image_source_rir([ROOM], RATE, 0.2), want, atol=1e-7, rtol=0)
    monkeypatch.setattr(image_source, "_BLOCK", {})
    torch.testing.assert_close(image_source_rir([ROOM], RATE, 0.2), want, atol=1e-7, rtol=0)


def test_a_batch_gives_each_room_its_own_response():
    rng = np.random.default_rng(3)
    rooms = [random_room(rng, RoomRanges(rt60_s=(0.15, 0.25))) for _ in range(3)]
    batch = image_source_rir(rooms, RATE, 0.2)
    assert batch.shape == (3, 1, 3200)
    for room, rir in zip(rooms, batch, strict=True):
        torch.testing.assert_close(image_source_rir([room], RATE, 0.2)[0], rir, atol=0, rtol=0)


def test_two_microphones_hear_the_sound_when_it_reaches_each():
    delays = direct_delay(image_source_rir([ROOM], 48000, 0.1)[0], 48000)
    want = [distance / 343 * 48000 for distance in ROOM.distances_m]
    np.testing.assert_allclose(delays.numpy(), want, atol=1.0)
    assert delays[0] != delays[1]


@pytest.mark.parametrize(("size_m", "rt60_s"), [((5.0, 4.0, 3.0), 0.3), ((4.0, 4.0, 3.5), 0.6), ((8.0, 6.0, 3.0), 0.5)])
def test_measured_reverberation_is_that_asked_for(size_m, rt60_s):
    room = Room.with_rt60(size_m, rt60_s, (1.1, 2.2, 1.3), ((2.9, 1.4, 1.7),))
    assert room.rt60_s == pytest.approx(rt60_s, rel=1e-6)
    measured = rt60_of(image_source_rir([room], RATE, 1.3 * rt60_s)[0, 0], RATE).item()
    assert measured == pytest.approx(rt60_s, rel=0.15)


def test_reverberation_of_unlike_walls():
    room = Room((6.0, 5.0, 3.0), (0.1, 0.2, 0.3, 0.1, 0.5, 0.4), (1.1, 2.2, 1.3), ((2.9, 1.4, 1.7),))
    measured = rt60_of(image_source_rir([room], RATE, 2 * room.rt60_s)[0, 0], RATE).item()
    assert measured == pytest.approx(room.rt60_s, rel=0.15)
    assert Room(room.size_m, (0.0,) * 6, room.source_m, room.mics_m).rt60_s == math.inf
    assert Room(room.size_m, (1.0,) * 6, room.source_m, room.mics_m).rt60_s == 0
    assert 0 < Room(room.size_m, (1.0, 1.0, 0.5, 0.5, 0.5, 0.5), room.source_m, room.mics_m).rt60_s < room.rt60_s


def test_the_highpass_takes_the_rumble_and_leaves_speech():
    room = Room.with_rt60((5.0, 4.0, 3.0), 0.5, (1.1, 2.2, 1.3), ((3.3, 1.2, 1.7),))
    plain, filtered = (image_source_rir([room], RATE, 0.5, highpass_hz=hz)[0, 0] for hz in (0, 20))
    before, after = (torch.fft.rfft(rir, n=RATE).abs() for rir in (plain, filtered))
    assert after[1] < 0.02 * before[1]
    gain = after[100:7000] / before[100:7000]
    assert (gain.log10() * 20).median().abs() < 0.01
    assert filtered[:60].abs().max() < 1e-6  # causal: nothing before the direct sound (115) but its own sinc


def test_early_part_keeps_the_start_and_fades_out_the_rest():
    room = Room.with_rt60((5.0, 4.0, 3.0), 0.5, (1.1, 2.2, 1.3), ((3.3, 1.2, 1.7), (1.3, 2.2, 1.3)))
    rir = image_source_rir([room], RATE)[0]
    early = early_part(rir, RATE, early_ms=50, fade_ms=5)
    for one, kept in zip(rir, early, strict=True):
        end = int(direct_delay(one, RATE)) + RATE // 20
        torch.testing.assert_close(kept[: end + 1], one[: end + 1], atol=0, rtol=0)
        assert kept[end + RATE // 200 :].abs().max() == 0
        half = end + RATE // 400
        torch.testing.assert_close(kept[half], one[half] / 2, rtol=1e-3, atol=1e-9)
    given = early_part(rir, RATE, direct_ms=direct_delay(rir, RATE) * 1000 / RATE)
    torch.testing.assert_close(given, early, atol=1e-6, rtol=0)


def test_rt60_of_an_exact_decay():
    time = torch.arange(RATE) / RATE
    noise = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))
    rates = torch.tensor([[0.3], [0.8]])
    rir = noise * 10 ** (-3 * time / rates)
    torch.testing.assert_close(rt60_of(rir, RATE), rates[:, 0], rtol=0.03, atol=0)
    assert rt60_of(torch.ones(100), RATE, -5, -60).isnan()  # does not get that far down


def test_sabine_and_eyring_are_inverted():
    size = (6.0, 5.0, 3.0)
    volume, surface = 90.0, 2 * (30 + 15 + 18)
    sabine = absorption_for_rt60(size, 0.7, "sabine")
    assert 0.1611 * volume / (surface * sabine) == pytest.approx(0.7, rel=1e-3)
    assert absorption_for_rt60(size, 0.7, "eyring") == pytest.approx(1 - math.exp(-sabine))
    with pytest.raises(ValueError, match=r"^rt60_s: 0.05 s is too short"):
        absorption_for_rt60(size, 0.05, "sabine")


def test_random_rooms_keep_to_their_ranges_and_come_again():
    ranges = RoomRanges(mic_offsets_m=((-0.05, 0.0, 0.0), (0.05, 0.0, 0.0)))
    rng = np.random.Generator(np.random.PCG64(7))
    rooms = [random_room(rng, ranges) for _ in range(50)]
    again = np.random.Generator(np.random.PCG64(7))
    assert rooms == [random_room(again, ranges) for _ in range(50)]
    for room in rooms:
        assert 3 <= room.size_m[0] <= 10 and 2.5 <= room.size_m[1] <= 8 and 2.3 <= room.size_m[2] <= 4
        assert 0.15 - 1e-9 <= room.rt60_s <= 0.9 + 1e-9
        centre = np.mean(room.mics_m, axis=0)
        assert 0.3 - 1e-9 <= math.dist(centre, room.source_m) <= 4.0
        assert min(room.source_m) >= 0.4
        assert math.dist(*room.mics_m) == pytest.approx(0.1)
        assert Room.from_dict(json.loads(json.dumps(room.to_dict()))) == room
    assert len({room.size_m for room in rooms}) == 50


def test_a_drawn_room_never_changes():
    """A manifest names rooms by seed: this one must stay what it is."""
    room = random_room(np.random.Generator(np.random.PCG64(2024)))
    np.testing.assert_allclose(room.size_m, GOLDEN_SIZE, rtol=0, atol=1e-6)
    np.testing.assert_allclose(room.source_m, GOLDEN_SOURCE, rtol=0, atol=1e-6)


GOLDEN_SIZE = (7.730819365868973, 3.678777606810417, 2.826068452498876)
GOLDEN_SOURCE = (6.326799332707575, 2.1159104460603606, 0.602552158497466)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"^source_m: \(6.0, 1.0, 1.0\) is not inside"):
        Room((5.0, 4.0, 3.0), (0.5,) * 6, (6.0, 1.0, 1.0), ((1.0, 1.0, 1.0),))
    with pytest.raises(ValueError, match="at the source"):
        Room((5.0, 4.0, 3.0), (0.5,) * 6, (1.0, 1.0, 1.0), ((1.0, 1.0, 1.0),))
    with pytest.raises(ValueError, match=r"^absorption:"):
        Room((5.0, 4.0, 3.0), (1.5,) * 6, (1.0, 1.0, 1.0), ((2.0, 1.0, 1.0),))
    with pytest.raises(ValueError, match=r"^mics_m: got none"):
        Room((5.0, 4.0, 3.0), (0.5,) * 6, (1.0, 1.0, 1.0), ())
    with pytest.raises(ValueError, match=r"^rooms:"):
        image_source_rir([], RATE, 0.1)
    with pytest.raises(ValueError, match=r"^length_s: got inf"):
        image_source_rir([Room((5.0, 4.0, 3.0), (0.0,) * 6, (1.0, 1.0, 1.0), ((2.0, 1.0, 1.0),))], RATE)
    with pytest.raises(ValueError, match=r"^ranges:"):
        random_room(np.random.default_rng(0), RoomRanges(distance_m=(50.0, 60.0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    room = Room.with_rt60((5.0, 4.0, 3.0), 0.4, (1.1, 2.2, 1.3), ((3.3, 1.2, 1.7),))
    want = image_source_rir([room], RATE, 0.4)
    got = image_source_rir([room], RATE, 0.4, device="cuda").cpu()
    assert torch.linalg.norm(got - want) < 2e-2 * torch.linalg.norm(want)  # a delay may round the other way
    assert torch.linalg.norm((got - want)[..., :1500]) < 1e-5 * torch.linalg.norm(want)
