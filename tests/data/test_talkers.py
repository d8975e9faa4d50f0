import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from banks import bank_of
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.core.errors import CorpusError
from allears.data.formants import formant_ratios
from allears.data.segments import lean_dict
from allears.data.talker_sets import overlap_of
from allears.data.talkers import TalkersConfig, TalkersSampler, TalkersSpec, read_talkers, write_talkers

NOISES = ("noise", "event", "music", "babble")
THREE = ((1, 0.2), (2, 0.4), (3, 0.4))


DEFAULT = TalkersConfig(rirs=3)


def sampler_of(config=DEFAULT, seed=5, lengths=(9000, 20_000, 12_000, 31_000) * 3, speakers=4):
    speech = bank_of(list(lengths), ["speech"] * len(lengths), 1, speakers)
    return TalkersSampler(speech, bank_of([5000] * 4, NOISES), config, np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(30, 30_000), min_size=4, max_size=8),
    st.integers(0, 2**32 - 1),
    st.integers(4_000, 40_000),
    st.sampled_from([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)]),
    st.booleans(),
)
def test_segments_stay_inside_and_no_voice_overlaps_itself(lengths, seed, frames, style, whole):
    config = TalkersConfig(seconds=frames / 16_000, talkers=THREE, whole_turns=whole)
    sampler = sampler_of(replace(config, conversation=style[0], partial=style[1]), seed, lengths)
    for _ in range(5):
        spec = sampler.sample("x")
        for talker in spec.talkers:
            assert talker.segments
            end = 0
            for segment in talker.segments:
                index = sampler.speech.index_of(segment.item)
                assert segment.at >= end and 0 < segment.length <= spec.frames - segment.at
                assert segment.start >= 0
                assert segment.start + (segment.length - 1) * segment.speed < sampler.speech.lengths[index]
                end = segment.at + segment.length


def test_same_seed_same_specs_and_file_round_trip(tmp_path):
    first, again = ([sampler.sample(str(n)) for n in range(12)] for sampler in (sampler_of(), sampler_of()))
    assert first == again != [sampler_of(seed=6).sample(str(n)) for n in range(12)]
    write_talkers(tmp_path / "set.jsonl", first)
    assert read_talkers(tmp_path / "set.jsonl") == first
    (tmp_path / "bad.jsonl").write_text(json.dumps(lean_dict(first[0]) | {"voices": 3}) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:1: unknown key 'voices'"):
        read_talkers(tmp_path / "bad.jsonl")
    assert lean_dict(TalkersSpec("a", 5, ())) == {"id": "a", "frames": 5, "talkers": []}


def test_talkers_are_distinct_persons_as_often_as_asked_and_by_the_root_of_their_hours():
    config = TalkersConfig(talkers=THREE, partial=0.0, rirs=7)
    # s0 has 16 times the samples of s1, and s2 as many as s1: weights 4, 1, 1, 1.
    sampler = sampler_of(config, lengths=(64_000, 4_000, 4_000, 4_000) * 2)
    owner = {item.id: item.speaker for item in sampler.speech.items}
    counts, alone = Counter(), Counter()
    for _ in range(800):
        spec = sampler.sample("x")
        people = [{owner[segment.item] for segment in talker.segments} for talker in spec.talkers]
        assert all(len(one) == 1 for one in people) and len(set.union(*people)) == len(people)
        assert all(len({segment.speed for segment in talker.segments}) == 1 for talker in spec.talkers)
        assert [talker.gain_db == 0 for talker in spec.talkers[:1]] == [True]
        assert all(-5 <= talker.gain_db <= 5 for talker in spec.talkers[1:])
        rooms = {None if talker.rir is None else talker.rir["bank"] for talker in spec.talkers}
        assert len(rooms) == 1 and rooms < {None, *range(7)}
        places = [talker.rir["source"] for talker in spec.talkers if talker.rir]
        assert places in ([], list(range(len(people))))
        if spec.noise_rir is not None:
            assert spec.noise_rir == {"bank": spec.talkers[0].rir["bank"], "source": -1}
        counts[len(people)] += 1
        if len(people) == 1:
            alone.update(people[0])
    for number, share in THREE:
        assert abs(counts[number] / 800 - share) < 0.06
    assert abs(alone["s0"] / counts[1] - 4 / 7) < 0.14


def test_shares_of_noise_and_rooms():
    specs = [sampler_of(TalkersConfig(noisy=0.0, reverberant=1.0, rirs=3)).sample("a") for _ in range(20)]
    assert all(spec.snr_db is None and not spec.noise and spec.synthetic is None for spec in specs)
    assert all(talker.rir is not None for spec in specs for talker in spec.talkers)
    noisy = sampler_of(TalkersConfig(noisy=1.0, snr_db=(3.0, 4.0)))
    specs = [noisy.sample("a") for _ in range(40)]
    assert all(3 <= spec.snr_db <= 4 and (spec.noise or spec.synthetic) for spec in specs)
    assert all(talker.rir is None and spec.noise_rir is None for spec in specs for talker in spec.talkers)
    assert not any(segment.item == "i3" for spec in specs for segment in spec.noise)  # babble is off


def test_conversations_take_turns():
    """All come to speak, with silences and a little overlap; clips that are no conversations overlap throughout."""
    config = TalkersConfig(seconds=30.0, talkers=((3, 1.0),), conversation=1.0, partial=0.0, noisy=0.0)
    sampler = sampler_of(config)
    talk = [sampler.sample("a") for _ in range(20)]
    assert all(len(spec.talkers) == 3 for spec in talk)
    assert 0.02 < np.mean([overlap_of(spec) for spec in talk]) < 0.35
    sampler.config = replace(config, conversation=0.0)
    assert np.mean([overlap_of(sampler.sample("a")) for _ in range(20)]) > 0.9
    sampler.config = replace(config, turn_overlap=0.0)
    assert max(overlap_of(sampler.sample("a")) for _ in range(20)) == 0
    sampler.config = replace(config, whole_turns=True, change_speed=0.0)
    spec = sampler.sample("a")
    whole = [
        segment.length == sampler.speech.lengths[sampler.speech.index_of(segment.item)]
        for talker in spec.talkers
        for segment in talker.segments
    ]
    assert sum(whole) >= len(whole) - 1


def test_what_is_left_out_and_what_is_refused():
    sampler = sampler_of(TalkersConfig(leave_out=("s0", "s1"), talkers=((2, 1.0),)))
    assert {item.speaker for item in sampler.speech.items} == {"s2", "s3"}
    with pytest.raises(CorpusError, match="2 speakers, and clips of 3"):
        sampler_of(TalkersConfig(leave_out=("s0", "s1"), talkers=THREE))
    assert len(sampler_of(TalkersConfig(talkers=((1, 1.0), (9, 0.0)))).sample("a").talkers) == 1
    for talkers in ((), ((0, 1.0),), ((2, -1.0),), ((2, 0.0),)):
        with pytest.raises(ValueError, match="talkers"):
            TalkersConfig(talkers=talkers)
    with pytest.raises(ValueError, match="conversation, partial"):
        TalkersConfig(conversation=0.7, partial=0.4)


def cast_sampler(narrow=(), **settings):
    """Two packages of three speakers and one of a single one."""
    bank = bank_of([20_000] * 14, ["speech"] * 14, speakers=7)
    package = {f"s{n}": f"p{n // 3}" for n in range(7)}
    items = [replace(i, package=package[i.speaker], narrow_band=i.speaker in narrow) for i in bank.items]
    config = TalkersConfig(talkers=((2, 1.0),), noisy=0.0, reverberant=0.0, conversation=0.0, **settings)
    return TalkersSampler(replace(bank, items=items), None, config, np.random.default_rng(3)), package


def casts(sampler, count=300):
    """Of each clip its talkers' speakers and speeds, and how many equalisers it has."""
    speakers = {item.id: item.speaker for item in sampler.speech.items}
    for n in range(count):
        talkers = sampler.sample(str(n)).talkers
        names = [speakers[talker.segments[0].item] for talker in talkers]
        yield names, [talker.segments[0].speed for talker in talkers], len({talker.eq_db for talker in talkers})


def test_talkers_recorded_alike_where_asked():
    sampler, package = cast_sampler(alike=1.0, eq=1.0)
    again = 0
    for (a, b), speeds, equalisers in casts(sampler):
        assert package[a] == package[b] and equalisers == 1
        if a == b:
            again += 1
            low, high = np.log(sampler.config.alike_speed)
            assert abs(np.log(speeds[0] / speeds[1])) > 0.24 * (high - low)
            assert all(0.8 <= speed <= 1.26 for speed in speeds)
        assert (a == b) == (a == "s6")
    assert again > 20
    sampler, package = cast_sampler(eq=1.0)
    drawn = list(casts(sampler))
    assert 0.2 < np.mean([package[a] == package[b] for (a, b), _, _ in drawn]) < 0.4
    assert all(a != b and equalisers == 2 for (a, b), _, equalisers in drawn)


def test_three_recorded_alike_have_three_parts_of_the_speeds():
    sampler, _ = cast_sampler(alike=1.0)
    sampler = replace(sampler, config=replace(sampler.config, talkers=((3, 1.0),)))
    orders = set()
    for names, speeds, _ in casts(sampler):
        if len(set(names)) == 1:
            orders.add(tuple(np.argsort(speeds)))
            assert np.diff(np.log(np.sort(speeds))).min() > 0.24 * np.log(1.26 / 0.8)
    assert len(orders) == 6


def test_one_band_a_clip_where_asked():
    sampler, _ = cast_sampler(narrow=("s1", "s4"), one_band=True)
    kinds = {tuple(sorted({name in ("s1", "s4") for name in names})) for names, _, _ in casts(sampler)}
    assert kinds == {(False,), (True,)}
    sampler, _ = cast_sampler(narrow=("s1", "s4"))
    assert any(len({name in ("s1", "s4") for name in names}) == 2 for names, _, _ in casts(sampler))


OLD = (
    '{"id": "a", "frames": 16000, "talkers": [{"segments": [{"item": "i10", "start": 0, "at": 0, "length": 10371, '
    '"speed": 1.157}, {"item": "i6", "start": 0, "at": 13625, "length": 2375, "speed": 1.157}]}, {"segments": [{"item":'
    ' "i0", "start": 0, "at": 3422, "length": 9977, "speed": 0.902}], "gain_db": 3.17}], "level_db": -16.42}'
)
"""A clip as it was drawn, and written, before voices could have other formants."""


def test_old_seeds_draw_old_clips_and_formants_come_last():
    config = TalkersConfig(
        seconds=1.0, talkers=((2, 1.0),), noisy=0.0, partial=0.0, conversation=0.0, rirs=3, alike=0.5
    )
    old = sampler_of(config, 11).sample("a")
    assert json.dumps(lean_dict(old)) == OLD
    for seed in range(20):
        settings = replace(config, talkers=THREE, noisy=0.5, conversation=0.3)
        plain = sampler_of(settings, seed).sample("a")
        moved = sampler_of(replace(settings, formant=1.0), seed).sample("a")
        assert all(0.84 <= talker.formants <= 1.19 for talker in moved.talkers)
        assert replace(moved, talkers=tuple(replace(talker, formants=1.0) for talker in moved.talkers)) == plain


def test_formants_in_as_many_voices_as_asked_evenly_in_logarithms(tmp_path):
    sampler = sampler_of(TalkersConfig(seconds=1.0, talkers=THREE, formant=0.4))
    specs = [sampler.sample(str(n)) for n in range(500)]
    ratios = np.array([talker.formants for spec in specs for talker in spec.talkers])
    moved = ratios[ratios != 1]
    assert abs(len(moved) / len(ratios) - 0.4) < 0.05
    quarters = np.histogram(np.log(moved), 4, np.log((0.8395, 1.1905)))[0] / len(moved)
    assert quarters.sum() == pytest.approx(1) and np.abs(quarters - 0.25).max() < 0.07
    write_talkers(tmp_path / "set.jsonl", specs)
    assert read_talkers(tmp_path / "set.jsonl") == specs
    lines = (tmp_path / "set.jsonl").read_text().splitlines()
    assert sum(line.count('"formants"') for line in lines) == len(moved)
    for span in ((1.1, 0.9), (0.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="formant_ratio"):
            TalkersConfig(formant_ratio=span)


def test_who_is_heard_twice_has_formants_far_apart():
    sampler, _ = cast_sampler(alike=1.0, formant=0.7, formant_ratio=(0.8, 1.25))
    speakers = {item.id: item.speaker for item in sampler.speech.items}
    twice = []
    for n in range(300):
        a, b = sampler.sample(str(n)).talkers
        if speakers[a.segments[0].item] == speakers[b.segments[0].item]:
            twice.append((a.formants, b.formants))
    moved = np.log([pair for pair in twice if pair != (1.0, 1.0)])
    assert 10 < len(moved) < len(twice)
    np.testing.assert_allclose(np.abs(moved[:, 0] - moved[:, 1]), 0.5 * np.log(1.25 / 0.8), atol=2e-3)
    three = formant_ratios(["x", "y", "x", "x"], 1.0, (1.0, 8.0), np.random.default_rng(0))
    places = np.sort(np.log2([three[0], *three[2:]]))
    np.testing.assert_allclose(np.diff(places), 1.0, atol=2e-3)
    assert formant_ratios(["x", "y"], 0.0, (0.8, 1.2), np.random.default_rng(0)) == [1.0, 1.0]


def test_voices_of_one_pitch_get_the_speeds_for_it(monkeypatch):
    pitch = {"s0": 100.0, "s1": 120.0, "s2": 300.0, "s3": 330.0}
    monkeypatch.setattr("allears.data.talkers.pitches_hz", lambda speech, items: np.array(list(pitch.values())))
    config = replace(DEFAULT, talkers=((2, 1.0),), one_pitch=1.0, change_speed=0.0, conversation=0.0, partial=0.0)
    sampler = sampler_of(config)
    for n in range(40):
        heard, who = [], set()
        for talker in sampler.sample(str(n)).talkers:
            segment = talker.segments[0]
            name = sampler.speech.items[sampler.speech.index_of(segment.item)].speaker
            heard.append(pitch[name] * segment.speed)
            who.add(name)
        assert len(who) == 2 and abs(np.log(heard[1] / heard[0])) < 0.065
