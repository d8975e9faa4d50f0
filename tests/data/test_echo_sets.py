from collections import Counter

import numpy as np
import pytest
from banks import bank_of

from allears.data.echo import write_echoes
from allears.data.echo_render import render_echo_set
from allears.data.echo_sets import CHANGE_S, DELAYS_MS, SETS, Cell, double_cells, draw_cells, draw_echo_sets, far_cells
from allears.data.echo_sets import change_cells as changes
from allears.data.talker_sets import Material


def material(speakers=3):
    noise = bank_of([40_000] * 3, ("noise", "event", "music"), 1)
    return Material(bank_of([18_000, 30_000, 50_000] * 4, ["speech"] * 12, speakers=speakers), noise)


def people(spec, bank):
    return tuple(bank.items[bank.index_of(part[0].item)].speaker if part else None for part in (spec.near, spec.far))


def test_cells_are_full_grids_and_names_unique():
    far, double = far_cells(), double_cells()
    assert Counter((cell.delay_ms, cell.linear, cell.rt60_s) for cell in far).most_common()[-1][1] == 3
    assert len(far) == 72 and 8 <= sum(cell.music for cell in far) <= 16
    assert {cell.delay_ms for cell in far if cell.music} == set(DELAYS_MS)
    assert len({(c.ser_db, c.delay_ms, c.linear, c.rt60_s) for c in double}) == len(double) == 72
    assert 30 <= sum(cell.snr_db is not None for cell in double) <= 42
    jumps = changes(True)
    assert {abs(cell.jump_ms) for cell in jumps} == {20, 60, 120, 200} and {cell.jump_ms > 0 for cell in jumps} == {
        True,
        False,
    }
    assert all(0 <= cell.delay_ms + cell.jump_ms <= 980 and not cell.moves for cell in jumps)
    assert all(cell.moves and cell.jump_ms is None for cell in changes(False))
    assert len({cell.name for cell in (*far, *double, *jumps, *changes(False))}) == 192


def test_a_clip_is_what_its_cell_says():
    drawn = material()
    cells = [
        Cell("a", "far", 300, None, True, 0.2),
        Cell("b", "double", 50, -15.0, False, 0.5, snr_db=20.0),
        Cell("c", "near", snr_db=10.0),
        Cell("d", "far", 0, music=True, jump_ms=60.0),
        Cell("e", "far", 0, moves=True),
        Cell("f", "double", 0, 5.0),
    ]
    specs = draw_cells(drawn, cells * 4, np.random.default_rng(0))
    assert specs == draw_cells(drawn, cells * 4, np.random.default_rng(0))
    first, second, near, jump, moved, _ = specs[:6]
    assert first.scenario == "far" and first.delay_ms == 300 and first.loudspeaker.linear and first.snr_db is None
    assert second.ser_db == -15 and not second.loudspeaker.linear and second.snr_db == 20 and second.noise_rir
    assert near.scenario == "near" and near.noise and near.echo_rir is None and near.far == ()
    assert jump.far_music and not jump.far and jump.delay_jump.by_ms == 60 and jump.delay_jump.at_s == CHANGE_S
    assert moved.path_change.at_s == CHANGE_S and moved.path_change.rir != moved.echo_rir
    assert all(spec.frames == 160_000 and spec.drift_ppm == 0 and not spec.gain_steps for spec in specs)
    pairs = Counter(people(spec, drawn.speech) for spec in specs if spec.scenario == "double")
    assert all(near != far for near, far in pairs)
    bent = [spec.loudspeaker for spec in draw_cells(drawn, [cells[1]] * 30, np.random.default_rng(1))]
    assert 4 < sum(len(speaker.polynomial) == 4 for speaker in bent) < 18


def test_a_set_renders_alike_alone_and_in_order(small_corpus, tmp_path):
    cells = [Cell("a", "double", 50, 0.0, False), Cell("b", "far", 150, moves=True), Cell("c", "near", snr_db=10.0)]
    specs = draw_cells(Material.from_corpus(small_corpus, "train"), cells, np.random.default_rng(0))
    write_echoes(tmp_path / "set.jsonl", specs)
    every = list(render_echo_set(small_corpus, tmp_path / "set.jsonl"))
    ((name, alone, facts),) = render_echo_set(small_corpus, tmp_path / "set.jsonl", keep=lambda spec: spec.id == "b")
    assert name == "b" and facts["changed_s"] == CHANGE_S and facts["delay_ms"] == 150 and facts["linear"]
    assert all(np.array_equal(one.numpy(), other.numpy()) for one, other in zip(alone, every[1][1], strict=True))
    assert [facts["scenario"] for _, _, facts in every] == ["double", "far", "near"]
    for _, clip, _ in every:
        whole = clip.mic.double().numpy() * 32767
        assert clip.mic.shape == (1, 160_000) and np.abs(whole - np.round(whole)).max() < 0.01
        assert (clip.mic - clip.near_reverberant - clip.echo - clip.noise).abs().max() < 1e-6
        assert clip.mic.abs().max() > 0.01


def test_sets_are_drawn_by_name(small_corpus, monkeypatch):
    monkeypatch.setattr(
        "allears.data.echo_sets.SETS", {"echo-near": ("train", SETS["echo-near"][1]), "echo-val": SETS["echo-val"]}
    )
    drawn = draw_echo_sets(small_corpus, ["echo-near"])
    assert list(drawn) == ["echo-near"] and len(drawn["echo-near"]) == 24
    assert drawn == draw_echo_sets(small_corpus, ["echo-near"]) != draw_echo_sets(small_corpus, ["echo-near"], seed=7)
    with pytest.raises(ValueError, match="'echo-nix' is no set"):
        draw_echo_sets(small_corpus, ["echo-nix"])
