from dataclasses import replace

import numpy as np
import pytest
from banks import bank_of

from allears.cli.main import main
from allears.data.talker_sets import OVERLAP, SETS, Material, draw_clips, draw_conversations, draw_sets, overlap_of
from allears.data.talkers import read_talkers, write_talkers
from allears.data.talkers_render import render_talker_set


def material(speakers=3, rooms=()):
    noise = bank_of([40_000] * 3, ("noise", "event", "music"), 1)
    return Material(bank_of([18_000, 30_000, 50_000] * 4, ["speech"] * 12, speakers=speakers), noise, rooms)


def people(spec, bank):
    return tuple(sorted(str(bank.items[bank.index_of(talker.segments[0].item)].speaker) for talker in spec.talkers))


def test_all_groups_in_turn_and_levels_evenly():
    drawn = material(rooms=("x#0", "y#0"))
    specs = draw_clips(drawn, 2, [1.0] * 30, np.random.default_rng(0), noisy=True)
    groups = [people(spec, drawn.speech) for spec in specs]
    assert groups == [("s0", "s1"), ("s0", "s2"), ("s1", "s2")] * 10
    assert sorted(spec.talkers[1].gain_db for spec in specs) == pytest.approx(np.arange(30) / 3 - 5 + 1 / 6, abs=0.006)
    assert sorted(spec.snr_db for spec in specs) == pytest.approx(5 + np.arange(30) / 2 + 0.25, abs=0.006)
    for index, spec in enumerate(specs):
        first, second = (talker.rir for talker in spec.talkers)
        if index % 10 == 9:
            assert (first, second, spec.noise_rir) == ({"item": "x#0"}, {"item": "y#0"}, None)
            continue
        rooms = [reference["room"] for reference in (first, second, spec.noise_rir) if reference]
        assert len({str(room["size_m"]) for room in rooms}) == 1
        assert len({str(room["mics_m"]) for room in rooms}) == len(rooms)
        assert all(len(room["mics_m"]) == 1 for room in rooms)
    assert 5 < sum(spec.noise_rir is not None for spec in specs) < 22
    assert specs == draw_clips(drawn, 2, [1.0] * 30, np.random.default_rng(0), noisy=True)
    clean = draw_clips(drawn, 3, [2.0, 2.5], np.random.default_rng(0))
    assert [spec.frames for spec in clean] == [32_000, 40_000] and all(len(spec.talkers) == 3 for spec in clean)
    assert all(spec.snr_db is None and talker.rir is None for spec in clean for talker in spec.talkers)


def test_conversations_overlap_as_much_as_wanted():
    clean, noisy = draw_conversations(material(), 60.0, np.random.default_rng(0))
    assert (clean.snr_db, noisy.snr_db) == (None, 12.5) and noisy.noise and noisy.talkers[1].rir
    assert abs(overlap_of(clean) - OVERLAP) < 0.05 and abs(overlap_of(noisy) - OVERLAP) < 0.05
    ends = [max(segment.at + segment.length for segment in talker.segments) for talker in clean.talkers]
    assert min(ends) > 45 * 16_000


def test_a_set_renders_alike_alone_and_in_order(small_corpus, tmp_path):
    drawn = Material.from_corpus(small_corpus, "train")
    assert len(drawn.speech.speakers()) == 2 and drawn.recorded_rooms == ()
    specs = draw_clips(drawn, 2, [1.0] * 2, np.random.default_rng(0))
    specs += draw_clips(drawn, 2, [0.8], np.random.default_rng(1), noisy=True)
    specs = [replace(spec, id=str(row)) for row, spec in enumerate(specs)]
    write_talkers(tmp_path / "set.jsonl", specs)
    assert read_talkers(tmp_path / "set.jsonl") == specs
    every = list(render_talker_set(small_corpus, tmp_path / "set.jsonl"))
    (alone,) = render_talker_set(small_corpus, tmp_path / "set.jsonl", keep=lambda spec: spec.id == "2")
    assert np.array_equal(every[2][1], alone[1]) and np.array_equal(every[2][2], alone[2])
    for name, mixture, sources, facts in every:
        assert mixture.dtype == sources.dtype == np.float32 and sources.shape == (2, len(mixture))
        whole = mixture.astype(np.float64) * 32767
        assert np.abs(whole - np.round(whole)).max() < 0.01 and np.abs(mixture).max() > 0.01
        assert sorted(facts["speakers"]) == ["s110", "s190"]
        assert (facts["snr_db"] is None) == (not facts["reverberant"]) == (name != "2")
        assert (np.abs(mixture - sources.sum(0)).max() < 1e-6) == (name != "2")


def test_sets_are_drawn_by_the_verb(small_corpus, tmp_path, capsys, monkeypatch):
    few = {"separate-clean1": SETS["separate-clean1"]}
    monkeypatch.setattr("allears.data.talker_sets.SETS", few)
    assert main(["data", "talkers", str(small_corpus), str(tmp_path)]) == 0
    assert "separate-clean1.jsonl: 60 clips" in capsys.readouterr().out.replace("\n", "")
    specs = read_talkers(tmp_path / "separate-clean1.jsonl")
    assert specs == draw_sets(small_corpus)["separate-clean1"] != draw_sets(small_corpus, seed=6)["separate-clean1"]
    assert all(64_000 <= spec.frames <= 80_000 and len(spec.talkers) == 1 for spec in specs)
    with pytest.raises(ValueError, match="'clean9' is no set"):
        draw_sets(small_corpus, ["clean9"])
