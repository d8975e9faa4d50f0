"""The benchmark of echo cancellation, with clips and systems made up: what is scored, and which rows come of it."""

import csv
import ctypes
import json
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.echo import SETS, EchoCase, delays
from benchmarks.echo_clips import Cancelled, EchoClip, alone, from_manifest, in_batches
from benchmarks.echo_scores import cases, names_of, rows_of, score_echo, table_rows
from benchmarks.echo_speed import EchoSpeedCase, median_seconds, noise_clip, one_core
from benchmarks.registry import NotInstalledError, System, systems_for
from benchmarks.scores import ClipScore
from benchmarks.systems import echo_peers

from allears.audio.metrics.echo_clip import ECHO_METRICS, EchoTruth
from allears.data.echo_spec import EchoSpec, write_echoes
from allears.data.segments import Segment

RATE = 16_000


def noise(count, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def clip_of(name="clip", scenario="far", samples=RATE, seed=0, **facts):
    far = noise(samples, seed) * (scenario != "near")
    near = noise(samples, seed + 100) * (scenario != "far")
    frames = -(-samples // 160) + 1
    echo = np.concatenate([np.zeros(160, np.float32), 0.5 * far])[:samples]
    active = [np.full(frames, on) for on in (scenario != "far", scenario != "near")]
    truth = EchoTruth(scenario, near + echo, far, near, near, np.ones(frames, np.int64), *active, None)
    plain = {"scenario": scenario, "linear": True, "delay_ms": 0.0, "ser_db": None, "snr_db": None, "changed_s": None}
    return EchoClip(name, truth, {**plain, **facts})


def test_clips_come_from_a_manifest_with_what_is_known_of_them(monkeypatch, tmp_path):
    said = (Segment("a", 0, 0, 100),)
    write_echoes(tmp_path / "set.jsonl", [EchoSpec(f"c{i}", 320, far=said) for i in range(4)])

    def render(corpus, manifest, keep):
        from allears.data.echo_spec import read_echoes

        for spec in read_echoes(manifest):
            if keep(spec):
                import torch

                fields = ("mic", "reference", "near", "near_reverberant", "delay_frames", "voice", "far_active")
                batch = SimpleNamespace(**{name: torch.full((1, 3), i) for i, name in enumerate(fields)})
                yield spec.id, batch, {"scenario": "far", "changed_s": 5.0, "corpus": corpus.name}

    monkeypatch.setattr("allears.data.echo_render.render_echo_set", render)
    found = list(from_manifest(tmp_path, tmp_path / "set.jsonl", limit=2))
    assert [clip.id for clip in found] == ["c0", "c2"]
    truth = found[0].truth
    assert (truth.scenario, truth.changed_s, truth.mic[0], truth.delay_frames[0], truth.far_active[0]) == (
        *("far", 5.0),
        *(0, 4, 6),
    )
    assert found[0].facts["corpus"] == tmp_path.name


def test_batches_are_of_one_length_and_in_order():
    clips = [clip_of(str(i), samples=n) for i, n in enumerate((320, 320, 320, 480, 320))]
    assert [[c.id for c in batch] for batch in in_batches(clips, 2)] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(in_batches([], 2)) == []


def test_a_clip_belongs_to_its_case_and_its_cells():
    def names(case, **facts):
        return names_of({"case": case, "linear": True, "delay_ms": 50.0, "ser_db": -5.0, "snr_db": None, **facts})

    assert names("far", linear=False) == ["far", "far-50ms", "far-distorts"]
    assert names("double") == ["double", "double-ser-5db", "double-linear"]
    assert names("near") == ["near", "near-clean"] and names("near", snr_db=10.0)[1] == "near-noisy"
    assert names("path_change", set="jump", scenario="far") == ["path_change", "path_change-jump-far"]


def entry(clip, system, case="far", delay_ms=0.0, **scores):
    facts = {"case": case, "set": case, "scenario": case, "delay_ms": delay_ms, "linear": True, "snr_db": None}
    return ClipScore(clip, system, facts, dict.fromkeys(ECHO_METRICS, np.nan) | scores)


def test_rows_are_means_gains_and_differences_without_empty_ones():
    entries = [
        *(entry(f"a{i}", "input", delay_ms=50.0 * i, erle_db=0.0) for i in range(2)),
        *(entry(f"a{i}", "one", delay_ms=50.0 * i, erle_db=10.0 + 2 * i) for i in range(2)),
        *(entry(f"a{i}", "two", delay_ms=50.0 * i, erle_db=20.0) for i in range(2)),
    ]
    assert [name for name, _ in cases(entries)] == ["far", "far-0ms", "far-linear", "far-50ms"]
    rows = {(r["case"], r["system"], r["metric"]): r for r in rows_of(entries, ["input", "one", "two"])}
    assert rows["far", "one", "erle_db"]["value"] == 11 and rows["far", "one", "erle_db"]["n"] == 2
    assert rows["far-50ms", "one", "erle_db"]["value"] == 12 and rows["far", "two", "erle_db_gain"]["value"] == 20
    difference = rows["far", "two_minus_one", "erle_db"]
    assert (difference["value"], difference["low"], difference["high"]) == (9, 8, 10)
    assert ("far-0ms", "two_minus_one", "erle_db") not in rows
    assert {metric for *_, metric in rows} == {"erle_db", "erle_db_gain"}
    assert table_rows(list(rows.values()), "far") == {
        "input": {"erle_db": "0 (0..0)"},
        "one": {"erle_db": "11 (10..12)"},
        "two": {"erle_db": "20 (20..20)"},
    }


def test_what_cannot_be_scored_is_nan_with_a_note(monkeypatch):
    clip = clip_of()
    scores, note = score_echo(clip, Cancelled(np.full(RATE, np.nan, np.float32)), ECHO_METRICS)
    assert np.isnan(list(scores.values())).all() and "NaN or infinity" in note
    scores, note = score_echo(clip, Cancelled(clip.truth.mic[1:]), ECHO_METRICS)
    assert np.isnan(list(scores.values())).all() and "samples" in note


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Two clips a set; systems that halve, that lose their delay, that fail; scores computed in this process."""
    sets = {
        "far": [clip_of(f"far{i}", seed=i, delay_ms=50.0 * i) for i in range(2)],
        "near": [clip_of(f"near{i}", "near", seed=i) for i in range(2)],
    }
    for name in sets:
        (tmp_path / f"echo-{name}.jsonl").write_text("{}\n")

    def broken(clips):
        if clips[0].id.startswith("far"):
            raise RuntimeError("out of order")
        return [Cancelled(clip.truth.mic) for clip in clips]

    def missing():
        raise NotInstalledError("no such package")

    made = {
        "input": lambda: lambda clips: [Cancelled(clip.truth.mic) for clip in clips],
        "half_way": lambda: lambda clips: [Cancelled(0.5 * clip.truth.mic, clip.truth.delay_frames) for clip in clips],
        "late": lambda: lambda clips: [Cancelled(np.roll(clip.truth.mic, 100)) for clip in clips],
        "broken": lambda: broken,
        "missing": missing,
    }
    table = [System(name, make, (), f"about {name}") for name, make in made.items()]
    monkeypatch.setattr("benchmarks.echo.systems_for", lambda task, names: [s for s in table if s.name in names])
    monkeypatch.setattr(
        "benchmarks.echo.from_manifest", lambda corpus, manifest, limit: iter(sets[manifest.stem[5:]][:limit])
    )

    def score_here(jobs, metrics, workers, score):
        for one, clip, found in jobs:
            ratio = (
                np.nan if found is None else 10 * np.log10(np.square(clip.truth.mic).sum() / np.square(found[0]).sum())
            )
            one.scores = dict.fromkeys(metrics, np.nan) | {"erle_db": float(ratio)}
            yield one

    monkeypatch.setattr("benchmarks.echo.score_in_background", score_here)

    def run(*systems, **options):
        case = EchoCase(
            systems=systems, sets_folder=tmp_path, out=tmp_path / "csv", results_folder=tmp_path / "json", **options
        )
        assert case.run() == 0
        document = json.loads((tmp_path / "json/echo.json").read_text())
        rows = {(r["case"], r["system"], r["metric"]): r for r in document["rows"]}
        return rows, document["notes"], list(csv.DictReader((tmp_path / "csv/echo.csv").open()))

    return run


def test_every_system_on_every_clip_with_notes(bench):
    rows, notes, lines = bench("input", "half_way", "broken", "missing", sets=("far", "near", "jump"))
    assert rows["far", "half-way", "erle_db"]["value"] == pytest.approx(6.02, abs=0.01)
    assert rows["near", "half-way", "erle_db_gain"]["n"] == 2 and ("far", "broken", "erle_db") not in rows
    assert len(lines) == 3 * 4 and {line["set"] for line in lines} == {"far", "near"}
    assert "half-way: about half_way" in notes and "missing: MISSING: no such package" in notes
    assert "jump: left out: echo-jump.jsonl does not exist" in notes
    assert any(note.startswith("half-way: 0 samples late") for note in notes)
    assert any("broken on far0: failed: RuntimeError('out of order')" in note for note in notes)


def test_a_system_whose_delay_is_left_in_stops_the_run(bench):
    with pytest.raises(ValueError, match="late: comes 100 samples late"):
        bench("input", "late", sets=("far",))


def test_bad_options_are_refused(bench):
    with pytest.raises(ValueError, match=r"sets: \['nowhere'\] given; known are far, double"):
        bench("input", sets=("nowhere",))
    with pytest.raises(ValueError, match="none of them can run here"):
        bench("missing", sets=("far",))
    assert set(SETS.values()) == {"far", "double", "near", "path_change"}


def test_our_systems_take_batches():
    kalman = systems_for("echo", ("kalman_oracle",))[0].load()
    clips = [clip_of(seed=seed, samples=2 * RATE) for seed in range(2)]
    for clip, found in zip(clips, kalman(clips), strict=True):
        late = slice(RATE, None)
        ratio = np.square(clip.truth.mic[late]).sum() / np.square(found.output[late]).sum()
        assert 10 * np.log10(ratio) > 20 and found.delay_frames is None
    assert systems_for("echo", ("input",))[0].load()(clips)[1].output is clips[1].truth.mic


def test_weights_are_loaded_by_name_and_tell_the_delay(tmp_path):
    import torch

    from allears.core.config import to_dict
    from allears.core.weights import save_weights
    from allears.models.echo.config import PRESETS
    from allears.models.echo.model import EchoNet

    torch.manual_seed(0)
    net = EchoNet(PRESETS["test"])
    save_weights(tmp_path / "weights", net.state_dict(), {"model": "echo", "config": to_dict(net.config)}, dtype=None)
    ours = systems_for("echo", ("allears",))[0]
    cancel = ours.load(name_or_folder=str(tmp_path), device="cpu")
    clip = clip_of("one", "double", samples=1_601)
    (found,) = cancel([clip])
    assert np.allclose(found.output, clip.truth.mic, atol=1e-4)  # untrained: the microphone, behind an open gate
    assert found.delay_frames.shape == clip.truth.delay_frames.shape
    with pytest.raises(NotInstalledError):
        ours.load(name_or_folder=str(tmp_path / "none"))


def test_frames_of_16_bit_keep_time_and_length():
    seen = []

    def late(mic, reference):
        seen.append((mic.dtype, len(mic)))
        out = np.concatenate([late.rest, mic])
        late.rest = out[160:]
        return out[:160]

    late.rest = np.zeros(50, np.int16)
    mic = noise(1_001)
    mic[3] = 2.0
    out = echo_peers.in_frames(mic, mic, 160, 50, late)
    assert out.dtype == np.float32 and out.shape == mic.shape and set(seen) == {(np.dtype(np.int16), 160)}
    assert np.abs(out - np.clip(mic, -1, 32767 / 32768)).max() <= 0.5 / 32768 + 1e-7


def test_speex_is_missing_with_a_reason(monkeypatch):
    def no(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no)
    with pytest.raises(NotInstalledError, match="apt install libspeexdsp1"):
        echo_peers.load_speex()


def test_speed_of_hops_and_clips(monkeypatch, tmp_path):
    import torch

    def no_onnx(net, path):
        raise ImportError("no onnx here")

    monkeypatch.setattr("allears.models.echo.export.export_onnx", no_onnx)
    server = tmp_path / "server.json"
    server.write_text(json.dumps({"rows": [{"case": "c", "system": "allears", "metric": "sessions", "value": 7.0}]}))
    threads = torch.get_num_threads()
    case = EchoSpeedCase(
        preset="test", systems=("kalman_oracle",), hops=3, seconds=1, server=server, results_folder=tmp_path
    )
    assert case.run() == 0 and torch.get_num_threads() == threads
    document = json.loads((tmp_path / "echo_speed.json").read_text())
    rows = {(r["case"], r["system"], r["metric"]): r["value"] for r in document["rows"]}
    assert rows["server", "allears", "sessions"] == 7.0
    assert rows["pytorch", "allears", "rtf"] > 0 and rows["pytorch", "allears", "p99_ms"] > 0
    assert rows["clip", "kalman-oracle", "rtf"] > 0
    assert "onnx: MISSING: no onnx here" in document["notes"]
    with pytest.raises(ValueError, match="preset: got 'huge'"):
        EchoSpeedCase(preset="huge", results_folder=tmp_path).run()


def test_the_median_of_runs_counts(monkeypatch):
    at = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])
    monkeypatch.setattr("benchmarks.echo_speed.time.perf_counter", lambda: next(at))
    heard = []
    assert median_seconds(lambda clips: heard.append(len(clips[0].truth.mic)), [noise_clip(2)]) == 2.0
    assert heard == [RATE] + 3 * [2 * RATE]
    with one_core():
        import torch

        assert torch.get_num_threads() == 1


def test_alone_is_a_near_end_without_a_far_one():
    near = noise(500)
    truth = alone("x", near).truth
    assert truth.scenario == "near" and not truth.reference.any() and truth.voice.shape == (5,)
    assert truth.voice.all() and not truth.far_active.any()
    assert delays({"same": lambda clips: [Cancelled(clip.truth.mic) for clip in clips]}, noise(RATE))[0].startswith(
        "same: 0"
    )
