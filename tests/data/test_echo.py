import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from banks import bank_of
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.core.errors import CorpusError
from allears.data.echo import EchoMixConfig, EchoSampler, EchoSpec, read_echoes, write_echoes
from allears.data.echo_rooms import EchoRoomRanges, room_with_loudspeaker
from allears.data.echo_spec import DelayJump, GainStep, PathChange
from allears.data.loudspeaker import Loudspeaker, LoudspeakerRanges
from allears.data.segments import Segment, lean_dict

NOISES = ("noise", "event", "music")
DEFAULT = EchoMixConfig(rirs=3)
SAID = (Segment("i0", 0, 0, 4000),)


def sampler_of(config=DEFAULT, seed=5, lengths=(9000, 20_000, 12_000, 31_000) * 3, speakers=4):
    speech = bank_of(list(lengths), ["speech"] * len(lengths), 1, speakers)
    return EchoSampler(speech, bank_of([5000] * 3, NOISES), config, np.random.default_rng(seed))


def drawn(count, config=DEFAULT, **more):
    sampler = sampler_of(config, **more)
    return [sampler.sample(str(n)) for n in range(count)]


def test_same_seed_same_specs_and_file_round_trip(tmp_path):
    first = drawn(40)
    assert first == drawn(40) != drawn(40, seed=6)
    write_echoes(tmp_path / "set.jsonl", first)
    assert read_echoes(tmp_path / "set.jsonl") == first
    whole = EchoSpec(
        "x",
        8000,
        SAID,
        SAID,
        path_change=PathChange({"bank": 1, "source": 1}, 0.25),
        loudspeaker=Loudspeaker(0.8, 0.5, (0.1, -0.1), -20.0, lowpass_hz=4000.0),
        gain_steps=(GainStep(0.1, 3.0), GainStep(0.2, -3.0)),
        ser_db=0.0,
        delay_ms=30.0,
        delay_jump=DelayJump(0.3, -20.0),
    )
    write_echoes(tmp_path / "set.jsonl", [whole])
    assert read_echoes(tmp_path / "set.jsonl") == [whole]
    (tmp_path / "bad.jsonl").write_text(json.dumps(lean_dict(whole) | {"echo": 3}) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:1: unknown key 'echo'"):
        read_echoes(tmp_path / "bad.jsonl")


def test_shares_and_ranges():
    specs = drawn(1500)
    counts = Counter(spec.scenario for spec in specs)
    for scenario, share in (("far", 0.3), ("near", 0.15), ("double", 0.55)):
        assert abs(counts[scenario] / 1500 - share) < 0.04
    echoes = [spec for spec in specs if spec.scenario != "near"]
    both = [spec for spec in specs if spec.scenario == "double"]

    def share(of, test):
        return sum(bool(test(spec)) for spec in of) / len(of)

    assert abs(np.mean([spec.ser_db for spec in both]) + 5) < 1.5
    assert min(spec.ser_db for spec in both) < -23 and max(spec.ser_db for spec in both) > 13
    assert all(spec.ser_db is None for spec in specs if spec.scenario != "double")
    assert abs(share(echoes, lambda spec: spec.delay_ms > 500) - 0.1) < 0.03
    assert max(spec.delay_ms for spec in echoes) > 900
    assert 0.05 < share(echoes, lambda spec: spec.delay_jump) < 0.13
    assert abs(share(echoes, lambda spec: spec.drift_ppm) - 0.1) < 0.03
    assert abs(share(echoes, lambda spec: not spec.loudspeaker.linear) - 0.6) < 0.05
    assert abs(share(echoes, lambda spec: spec.far_music) - 0.12) < 0.03
    assert 0.1 < share(echoes, lambda spec: spec.path_change) < 0.19
    assert abs(share(echoes, lambda spec: spec.gain_steps) - 0.15) < 0.03
    assert abs(share(specs, lambda spec: spec.snr_db is not None) - 0.7) < 0.04
    for spec in specs:
        assert (spec.snr_db is None) == (not spec.noise and spec.synthetic is None)
        assert 20 <= spec.highpass_hz <= 60
    for spec in (spec for spec in specs if spec.scenario == "near"):
        plain = (spec.echo_rir, spec.path_change, spec.delay_jump, spec.delay_ms, spec.gain_steps, spec.drift_ppm)
        assert plain == (None, None, None, 0.0, (), 0.0) and spec.loudspeaker == Loudspeaker()


def test_ends_are_distinct_speakers_in_one_room_at_places_of_their_own():
    sampler = sampler_of()
    owner = {item.id: item.speaker for item in sampler.speech.items}
    seen = set()
    for _ in range(300):
        spec = sampler.sample("x")
        near, far = ({owner[segment.item] for segment in said} for said in (spec.near, spec.far))
        assert len(near) <= 1 and len(far) <= 1 and not near & far
        assert not spec.far or not spec.far_music
        seen |= {(*near, *far)} if near and far else set()
        moved = spec.path_change.rir if spec.path_change else None
        found = [spec.echo_rir, moved, spec.near_rir, spec.noise_rir]
        assert len({rir["bank"] for rir in found if rir}) <= 1
        for rir, place in zip(found, (0, 1, 2, -1), strict=True):
            assert rir is None or rir["source"] == place
    assert len(seen) == 12  # ordered pairs of 4
    spec = sampler.sample("x", "double", ("s3", "s1"))
    assert {owner[segment.item] for segment in spec.near} == {"s3"}
    assert spec.far_music or {owner[segment.item] for segment in spec.far} == {"s1"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(300, 30_000), min_size=4, max_size=8),
    st.integers(0, 2**32 - 1),
    st.integers(4_000, 40_000),
    st.floats(0.0, 1000.0),
)
def test_all_stays_inside_the_clip_and_the_longest_delay(lengths, seed, frames, longest):
    config = EchoMixConfig(seconds=frames / 16_000, jump=1.0, path_change=1.0, gain_step=1.0, rirs=2).within(longest)
    sampler = sampler_of(config, seed, lengths)
    for _ in range(4):
        spec = sampler.sample("x")
        for segment in (*spec.near, *spec.far):
            index = sampler.speech.index_of(segment.item)
            assert segment.at >= 0 and 0 < segment.length <= spec.frames - segment.at and segment.start >= 0
            assert segment.start + (segment.length - 1) * segment.speed < sampler.speech.lengths[index]
        after = spec.delay_ms + (spec.delay_jump.by_ms if spec.delay_jump else 0.0)
        bound = min(longest, 980.0) + 0.02
        assert 0 <= spec.delay_ms <= bound and 0 <= after <= bound
        if spec.delay_jump:
            assert 20 <= abs(spec.delay_jump.by_ms) <= 200
        moments = [change.at_s for change in (spec.path_change, spec.delay_jump, *spec.gain_steps) if change]
        assert all(0 < at < config.seconds for at in moments)


def test_delays_widen_in_steps():
    narrow = DEFAULT.within(64.0)
    assert narrow.delay_ms == (0.0, 64.0) and narrow.long_delay == 0.0
    assert max(spec.delay_ms for spec in drawn(200, narrow)) > 55
    assert DEFAULT.within(2000.0) == DEFAULT
    middle = DEFAULT.within(700.0)
    assert middle.long_delay == DEFAULT.long_delay and middle.delay_ms == DEFAULT.delay_ms
    assert 500 < max(spec.delay_ms for spec in drawn(300, middle)) <= 700


def test_rooms_hold_a_loudspeaker_that_can_be_moved():
    rng = np.random.default_rng(0)
    near_by = 0
    for _ in range(200):
        room = room_with_loudspeaker(rng)
        mic, (speaker, moved, near, noise) = np.array(room.source_m), np.array(room.mics_m)
        assert 0.05 <= np.linalg.norm(speaker - mic) <= 3.0 and 0.3 <= np.linalg.norm(near - mic) <= 3.0
        assert 0.05 <= np.linalg.norm(moved - speaker) <= 0.5 and np.linalg.norm(noise - mic) >= 0.3
        near_by += np.linalg.norm(speaker - mic) < 1.0
    assert 120 < near_by < 160
    assert abs(room_with_loudspeaker(rng, ranges=EchoRoomRanges(rt60_s=(0.3, 0.3))).rt60_s - 0.3) < 0.01
    with pytest.raises(ValueError, match="talkers: got 2, wanted 3"):
        room_with_loudspeaker(rng, 2)


def test_what_is_refused():
    with pytest.raises(ValueError, match="ser_db: a has a near and a far end"):
        EchoSpec("a", 8000, SAID, SAID)
    with pytest.raises(ValueError, match="delay_ms"):
        EchoSpec("a", 8000, far=SAID, delay_ms=10.0, delay_jump=DelayJump(1.0, -20.0))
    with pytest.raises(ValueError, match="far_only, near_only"):
        EchoMixConfig(far_only=0.7, near_only=0.4)
    with pytest.raises(ValueError, match="delay_ms"):
        EchoMixConfig(delay_ms=(200.0, 500.0), longest_delay_ms=100.0)
    with pytest.raises(CorpusError, match="1 speaker; wanted two"):
        sampler_of(replace(DEFAULT, leave_out=("s0", "s1", "s2")))
    with pytest.raises(ValueError, match="sigmoid"):
        Loudspeaker(sigmoid=1.5)
    with pytest.raises(ValueError, match="highpass_hz"):
        Loudspeaker(highpass_hz=500.0, lowpass_hz=400.0)
    without = EchoSampler(sampler_of().speech, None, replace(DEFAULT, noisy=1.0), np.random.default_rng(0))
    specs = [without.sample("a") for _ in range(60)]
    assert all(spec.synthetic and not spec.noise and not spec.far_music for spec in specs)
    linear = replace(DEFAULT, loudspeaker=LoudspeakerRanges(nonlinear=0.0))
    assert all(spec.loudspeaker.linear for spec in drawn(60, linear))
