from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import bank_of

from allears.audio.formants import shift_formants
from allears.audio.rooms import early_part
from allears.audio.shoebox import Room
from allears.core.config import to_dict
from allears.core.errors import CorpusError
from allears.data.mix import Segment, Synthetic
from allears.data.reverb import APART_M, RirBank, room_responses, room_with_sources
from allears.data.talkers import Talker, TalkersConfig, TalkersSampler, TalkersSpec
from allears.data.talkers_render import TalkersRenderer
from allears.data.waves import active_rms

BANK = bank_of([9000] * 4, ["speech"] * 4, speakers=4)
ROOM = Room.with_rt60((5.0, 4.0, 3.0), 0.5, (1.0, 1.0, 1.5), ((3.0, 2.0, 1.5), (4.0, 1.0, 1.2), (2.0, 3.0, 1.0)))


def clip(*gains_db, frames=8000, **more):
    talkers = tuple(Talker((Segment(f"i{n}", 0, 0, frames),), gain) for n, gain in enumerate(gains_db))
    return TalkersSpec("a", frames, talkers, **more)


def db(x):
    return 20 * torch.log10(x)


def test_clean_mixture_is_the_sum_of_its_sources_and_missing_talkers_are_silent():
    """To the bit, in whatever company: other clips of the batch have rooms, noise and filters."""
    wet = tuple(replace(talker, rir={"room": to_dict(ROOM)}, eq_db=(3.0,) * 7) for talker in clip(0.0, 1.0).talkers)
    others = [replace(clip(0.0, snr_db=10.0), talkers=wet, synthetic=Synthetic(3))]
    for batch in ([clip(0.0, -4.0), clip(0.0)], [clip(0.0, -4.0), clip(0.0), *others]):
        mixture, sources = TalkersRenderer(BANK, rirs=RirBank())(batch, 3)
        assert mixture.shape == (len(batch), 8000) and sources.shape == (len(batch), 3, 8000)
        for row in (0, 1):
            assert torch.equal(mixture[row], sources[row].sum(0))
        assert not sources[0, 2].any() and not sources[1, 1:].any()
    assert not torch.equal(mixture[2], sources[2].sum(0))
    alone, _ = TalkersRenderer(BANK)([clip(0.0, -4.0)])
    torch.testing.assert_close(alone[0], mixture[0], atol=1e-6, rtol=1e-4)
    wanted, got = torch.from_numpy(BANK.crop(1, 200, 7600)), sources[0, 1, 200:7800]
    torch.testing.assert_close(got / got.norm(), wanted / wanted.norm(), atol=2e-5, rtol=1e-3)


def test_levels_of_talkers_noise_and_mixture():
    spec = clip(0.0, -4.5, 3.0, noise=(Segment("i3", 0, 0, 8000),), snr_db=7.0, level_db=-30.0)
    mixture, sources = TalkersRenderer(BANK, BANK)([spec])
    levels = db(active_rms(sources[0]))[:, 0]
    torch.testing.assert_close(levels - levels[0], torch.tensor([0.0, -4.5, 3.0]), atol=0.01, rtol=0)
    noise = mixture - sources.sum(1)
    assert abs(float(db(active_rms(sources.sum(1))) - db(noise.square().mean().sqrt())) - 7.0) < 0.05
    assert abs(float(db(mixture.square().mean().sqrt())) + 30.0) < 0.01
    loud, sources = TalkersRenderer(BANK)([clip(0.0, 5.0, level_db=0.0)])
    assert abs(float(torch.maximum(loud.abs().max(), sources.abs().max())) - 0.98) < 1e-5
    assert torch.equal(loud[0], sources[0].sum(0))


def test_a_pause_is_not_raised_to_the_level_of_speech():
    hushed = replace(BANK, audio=np.concatenate([BANK.audio[:9000], BANK.audio[9000:] // 1500]))
    _, sources = TalkersRenderer(hushed)([clip(0.0, 0.0)])
    assert db(active_rms(sources[0, 1:]) / active_rms(sources[0, :1])) < -20


def test_source_in_a_room_is_the_early_part_at_his_own_place():
    talkers = tuple(Talker((Segment(f"i{n}", 0, 0, 4000),), rir={"room": to_dict(ROOM), "source": n}) for n in range(2))
    spec = TalkersSpec("a", 16_000, talkers)
    mixture, sources = TalkersRenderer(BANK, rirs=RirBank())([spec])
    late = sources.sum(1)[0, 6000:].square().mean()
    assert mixture[0, 6000:].square().mean() > 100 * late
    torch.testing.assert_close(mixture[0, :700], sources[0, :, :700].sum(0), atol=1e-5, rtol=1e-3)
    for n in range(2):
        rir = early_part(RirBank().response(talkers[n].rir), 16_000)
        dry, _ = TalkersRenderer(BANK)([replace(spec, talkers=(replace(talkers[n], rir=None),))])
        wanted = np.convolve(dry[0].double().numpy(), rir.double().numpy())[:16_000]
        got = sources[0, n].double().numpy()
        assert np.dot(wanted, got) / np.linalg.norm(wanted) / np.linalg.norm(got) > 1 - 1e-6
    with pytest.raises(ValueError, match="no room responses"):
        TalkersRenderer(BANK)([spec])


def test_noise_has_a_place_in_the_room_too():
    spec = clip(0.0, frames=16_000, noise=(Segment("i3", 0, 0, 4000),), snr_db=0.0, noise_rir={"bank": 0, "source": -1})
    spec = replace(spec, talkers=(Talker((Segment("i0", 0, 0, 4000),)),))
    bank = RirBank.simulate(1, 3, talkers=2)
    heard = TalkersRenderer(BANK, rirs=bank)([spec])[0][0, 4000:8000]
    faded = BANK.crop(3, 0, 4000) * np.minimum(1, np.minimum(np.arange(1, 4001), np.arange(4000, 0, -1)) / 80)
    wanted = np.convolve(faded, bank.full[0, 2].double().numpy())[4000:8000]
    assert np.corrcoef(heard.double().numpy(), wanted)[0, 1] > 0.999


def test_rendering_again_gives_the_same_and_wrong_batches_are_refused():
    config = TalkersConfig(seconds=0.5, rirs=2, noisy=0.7)
    render = TalkersRenderer(BANK, BANK, RirBank.simulate(2, 1, talkers=3))
    specs = [TalkersSampler(BANK, BANK, config, np.random.default_rng(s)).sample("a") for s in range(6)]
    first, again = render(specs, 3), render(specs, 3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.isfinite(first[0]).all() and first[0].abs().max() <= 0.981
    silent = render([TalkersSpec("a", 8000, ())])
    assert silent[1].shape == (1, 1, 8000) and not silent[0].any()
    with pytest.raises(ValueError, match="same length"):
        render([clip(0.0), clip(0.0, frames=4000)])
    with pytest.raises(ValueError, match="talkers: 1 given, but a clip has 2"):
        render([clip(0.0, 1.0)], 1)


def test_rooms_of_one_talker_are_what_they_were():
    """Numbers of the code that the shipped enhancer was trained with."""
    full = RirBank.simulate(2, 5).full
    assert full.shape == (2, 2, 14_400)
    torch.testing.assert_close(
        full.abs().sum(-1), torch.tensor([[84.0451, 104.1158], [41.3285, 56.4191]]), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(full[:, :, 500], torch.tensor([[-0.0748, 0.0372], [0.0102, -0.0597]]), atol=1e-4, rtol=0)


def test_rooms_of_several_talkers(tmp_path):
    bank = RirBank.simulate(2, 5, talkers=3, cache=tmp_path / "rooms.npy")
    assert bank.full.shape == (2, 4, 14_400)
    kept = RirBank.simulate(2, 5, talkers=3, cache=tmp_path / "rooms.npy").full
    torch.testing.assert_close(kept, bank.full.half().float(), atol=0, rtol=0)
    assert RirBank.simulate(2, 5, talkers=2, cache=tmp_path / "rooms.npy").full.shape[1] == 3
    references = [None, {"bank": 1, "source": -1}, {"room": to_dict(ROOM), "source": 2}, {"bank": 0, "source": 2}]
    stack = room_responses(bank, references, "talker", torch.device("cpu"))
    assert stack[0, 0] == 1 and not stack[0, 1:].any()
    assert torch.equal(stack[1], bank.full[1, 3]) and torch.equal(stack[3], bank.full[0, 2])
    single = bank.response({"room": to_dict(replace(ROOM, mics_m=ROOM.mics_m[2:])), "source": 0})
    torch.testing.assert_close(stack[2, : len(single)], single)
    assert room_responses(None, [None, None], "talker", torch.device("cpu")) is None
    with pytest.raises(CorpusError, match="rirs"):
        RirBank().response({"bank": 0, "source": 1})
    rng = np.random.default_rng(2)
    for _ in range(30):
        places = np.array(room_with_sources(rng, 3).mics_m)[:3]
        apart = np.linalg.norm(places[:, None] - places, axis=-1)[np.triu_indices(3, 1)]
        assert apart.min() >= APART_M


def test_formants_are_moved_in_the_dry_voice():
    """Also where only some voices of the batch have other ones, and up to where a narrow-band recording ends."""
    plain = clip(0.0, 0.0, 0.0)
    narrow = replace(BANK, items=[replace(item, narrow_band=item.id == "i2") for item in BANK.items])
    talkers = [replace(talker, formants=ratio) for talker, ratio in zip(plain.talkers, (1.0, 0.84, 1.15), strict=True)]
    fast = replace(talkers[2].segments[0], length=7000, speed=1.25)
    talkers[2] = replace(talkers[2], segments=(fast,))
    plain = replace(plain, talkers=(*plain.talkers[:2], replace(plain.talkers[2], segments=(fast,))))
    (_, before), (_, after) = (TalkersRenderer(narrow)([spec]) for spec in (plain, replace(plain, talkers=(*talkers,))))
    by_hand = shift_formants(before[0], torch.tensor([1.0, 0.84, 1.15]), top_hz=torch.tensor([8000.0, 8000.0, 5000.0]))
    for row in range(3):
        wanted, got = by_hand[row] / active_rms(by_hand[row : row + 1])[0], after[0, row] / active_rms(after[0])[row]
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)
    change = [
        float((after[0, row] - before[0, row]).square().sum() / before[0, row].square().sum()) for row in range(3)
    ]
    assert change[1] > 0.01 and change[2] > 0.01


def test_a_room_hears_the_moved_formants_and_other_rows_keep_their_samples():
    talker = clip(0.0).talkers[0]
    dry, wet = (TalkersSpec("a", 8000, (replace(talker, formants=1.15, rir=rir),)) for rir in (None, {"bank": 0}))
    rooms = RirBank.simulate(1, 3, talkers=1)
    render = TalkersRenderer(BANK, rirs=rooms)
    _, source = render([dry])
    response = early_part(rooms.full[0, :1], 16_000)[0]
    wanted = np.convolve(source[0, 0].double().numpy(), response.double().numpy())[:8000]
    got = render([wet])[1][0, 0].double().numpy()
    assert np.dot(wanted, got) / np.linalg.norm(wanted) / np.linalg.norm(got) > 1 - 1e-5
    alone, both = render([clip(0.0, 1.0)])[0], render([clip(0.0, 1.0), dry])[0]
    assert torch.equal(alone[0], both[0])


def test_no_formants_no_work(monkeypatch):
    def refuse(*_):
        raise AssertionError("called")

    monkeypatch.setattr("allears.data.talkers_render.shift_formants", refuse)
    TalkersRenderer(BANK)([clip(0.0, 1.0), TalkersSpec("b", 8000, (Talker((), formants=1.2),))], 3)
    with pytest.raises(AssertionError, match="called"):
        TalkersRenderer(BANK)([replace(clip(0.0), talkers=(replace(clip(0.0).talkers[0], formants=1.2),))])
