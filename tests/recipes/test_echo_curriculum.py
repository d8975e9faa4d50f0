"""Stages of the echo canceller's training, what they hear, and the scores of validation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from echo_parts import small_data, write_corpus

from allears.core.errors import CorpusError
from allears.recipes.echo_data import (
    STAGES,
    TRAIN_MIX,
    Clips,
    chosen_stages,
    load_data,
    scores,
    stage_mix,
    validation_set,
)

MIX = replace(TRAIN_MIX, seconds=0.6, jump=0.4, drift=0.4, path_change=0.4)


def test_stages_keep_their_order_and_share_the_run():
    plan = chosen_stages(None)
    assert [stage.name for stage in plan] == list(STAGES)
    assert sum(stage.share for stage in plan) == pytest.approx(1.0)
    assert plan[0].linear and not any(stage.linear for stage in plan[1:])
    assert plan[-1].voice and not any(stage.voice for stage in plan[:-1])
    delays = [stage.longest_delay_ms for stage in plan]
    assert delays == sorted(delays) and delays[0] == 64.0 and delays[-1] == 1000.0
    some = chosen_stages({"voice": 1, "short": 3}, 1.5)
    assert [(stage.name, stage.share, stage.seconds) for stage in some] == [("short", 0.75, 1.5), ("voice", 0.25, 1.5)]
    named = chosen_stages(["long", "voice"])
    assert named[0].share == pytest.approx(2 / 3) and named[0].seconds == STAGES["long"].seconds
    for given, match in (
        (["begin"], "stages: 'begin' is unknown"),
        ({"long": 0.0}, "share 0.0 of 'long'"),
        ({"long": float("nan")}, "share nan of 'long'"),
        (["linear"], "end to end"),
        ([], "end to end"),
    ):
        with pytest.raises(ValueError, match=match):
            chosen_stages(given)


@pytest.mark.parametrize("name", ["linear", "middle", "voice"])
def test_clips_of_a_stage(name):
    stage = replace(STAGES[name], seconds=0.6)
    data = small_data()
    clips = Clips(data, stage_mix(MIX, stage, data.room_count), 16, 9)
    specs = clips.draw((3, 0))
    again = Clips(data, stage_mix(MIX, stage, data.room_count), 16, 9)
    assert again.draw((3, 0)) == specs != again.draw((3, 1)) and again.draw((4, 0)) != specs
    assert Clips(data, stage_mix(MIX, stage, data.room_count), 16, 10).draw((3, 0)) != specs
    most = min(stage.longest_delay_ms, 980.0)
    after = [spec.delay_ms + (spec.delay_jump.by_ms if spec.delay_jump else 0.0) for spec in specs]
    assert max(spec.delay_ms for spec in specs) <= most and min(after) >= 0 and max(after) <= most
    assert max(spec.delay_ms for spec in specs) > 0.4 * most
    changed = [spec for spec in specs if spec.delay_jump or spec.drift_ppm or spec.path_change or spec.gain_steps]
    assert bool(changed) == stage.changes
    speakers = {item.id: item.speaker for item in data.speech.items}
    for spec in specs:
        near, far = ({speakers[segment.item] for segment in part} for part in (spec.near, spec.far))
        assert not near & far and spec.frames == 9600
    batch = clips(0)
    assert batch.mic.shape == (16, 9600) and bool(batch.far_active.any()) and bool(batch.voice.any())
    assert torch.equal(batch.mic, again(0).mic)


def test_corpus_is_parted_by_people(tmp_path):
    corpus = write_corpus(tmp_path)
    data = load_data([corpus], torch.device("cpu"), 0)
    assert sorted(data.speech.speakers()) == ["s0", "s1", "s2", "s3"] and sorted(data.held.speakers()) == ["s4", "s5"]
    assert {item.split for item in data.noise.items} == {"train"} and {item.kind for item in data.noise.items} == {
        "noise",
        "event",
        "music",
    }
    assert len(data.held_noise.items) == 3 and data.room_count == 0
    assert data.renderer._flat_speech is data.held_renderer._flat_speech
    held = load_data([corpus], torch.device("cpu"), 1, 3, str(tmp_path / "rooms"), hold_out=("s1",))
    assert sorted(held.speech.speakers()) == ["s0", "s2", "s3"] and "s1" in held.held.speakers()
    assert held.room_count == 1 and len(list((tmp_path / "rooms").iterdir())) == 2
    rooms = [renderer.rirs.full for renderer in (held.renderer, held.held_renderer)]
    assert rooms[0].shape[:2] == (1, 4) and not torch.equal(*rooms)
    alone = load_data([corpus], torch.device("cpu"), 0, hold_out=("s0", "s1", "s2"))
    with pytest.raises(CorpusError, match="two or more"):
        Clips(alone, MIX, 1, 0)


def test_scores_of_known_outputs():
    mix = stage_mix(MIX, STAGES["short"], 0)
    validation = validation_set(small_data(), replace(mix, seconds=0.6), 12)
    assert validation.scenarios[:4] == ("far", "double", "near", "far")
    same = validation_set(small_data(), replace(mix, seconds=0.6), 12)
    assert torch.equal(same.clips.mic, validation.clips.mic)
    clips, frames = validation.clips, validation.clips.delay_frames.shape[1]
    exact = F.one_hot(clips.delay_frames, 30).float()
    told = 4.0 * clips.voice.float() - 2.0

    untouched = scores(clips.mic, None, None, validation)
    assert set(untouched) == {"erle_db", "si_sdr_gain_db", "near_sdr_db", "near_level_db"}
    assert untouched["erle_db"] == untouched["si_sdr_gain_db"] == 0.0
    perfect = scores(clips.near, exact, told, validation)
    assert perfect["erle_db"] == perfect["near_sdr_db"] == 80.0 and perfect["si_sdr_gain_db"] > 20
    assert perfect["near_level_db"] == 0.0 and perfect["alignment"] == perfect["voice"] == 1.0
    worse = scores(0.1 * clips.mic, exact.roll(1, -1), -told, validation)
    assert worse["erle_db"] == pytest.approx(20.0) and worse["si_sdr_gain_db"] == pytest.approx(0.0, abs=1e-6)
    assert worse["near_level_db"] == pytest.approx(untouched["near_level_db"] - 20.0, abs=1e-6)
    assert worse["alignment"] == 1.0 and worse["voice"] == 0.0
    assert worse["near_sdr_db"] == pytest.approx(0.9, abs=0.3)  # 10 % of it: 20 log10(1 / 0.9)
    assert scores(clips.mic, exact.roll(2, -1), None, validation)["alignment"] == 0.0
    part = exact.clone()
    part[:, : frames // 2] = exact[:, : frames // 2].roll(3, -1)
    right = clips.far_active[:, frames // 2 :].sum() / clips.far_active.sum()
    assert scores(clips.mic, part, None, validation)["alignment"] == pytest.approx(float(right))
    far = replace(validation, scenarios=("far",) * 12)
    assert set(scores(clips.mic, None, None, far)) == {"erle_db"}
