"""The benchmarks of separation quality, with stand-ins for the network: what is scored, on which output, and how."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.separate import SeparateCase
from benchmarks.separate_conversation import (
    SeparateConversationCase,
    Tally,
    count_swaps,
    holders,
    join_blindly,
    spurts,
)
from benchmarks.separate_speed import SeparateSpeedCase
from benchmarks.talkers import (
    FLOOR_DB,
    TalkerClip,
    assign,
    from_manifest,
    long_scores,
    sdr_db,
    separation_scores,
    si_snr_db,
)

from allears.data.talkers import TalkersSpec, read_talkers, write_talkers
from benchmarks import registry, separate_scores

RATE = 16_000


def voices(count, seconds, seed=0, rate=RATE):
    """(K, T) float32, independent noise below 3 kHz: what survives resampling to 8 kHz."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal((count, int(seconds * rate))))
    spectrum[:, np.fft.rfftfreq(int(seconds * rate), 1 / rate) > 3000] = 0
    return (0.1 * np.fft.irfft(spectrum, int(seconds * rate))).astype(np.float32)


def clip_of(sources, name="clip", **facts):
    return TalkerClip(name, sources.sum(0), sources, facts)


class FakeSeparator:
    """Gives the sources of the clips it knows, in ``order``, each with ``leak`` of the rest; then silent outputs."""

    def __init__(self, clips, leak, talkers=3, rate=RATE, silent_outputs=True, order=(1, 0, 2)):
        self.config = SimpleNamespace(
            sample_rate_hz=rate, talkers=talkers, silent_outputs=silent_outputs, sepreformer=object(), attention="fla"
        )
        self.parameters, self.device = 3_710_000, torch.device("cpu")
        self._clips = [clip.at_rate(rate) for clip in clips]
        self._leak, self._order = leak, [i for i in order if i < talkers]
        self.heard_s = []

    def outputs(self, mixture):
        for clip in self._clips:
            for first in range(0, len(clip.mixture) - len(mixture) + 1, self.config.sample_rate_hz):
                if np.array_equal(clip.mixture[first : first + len(mixture)], mixture):
                    sources = clip.sources[:, first : first + len(mixture)]
                    out = np.zeros((self.config.talkers, len(mixture)), np.float32)
                    out[: len(sources)] = sources + self._leak * (mixture - sources)
                    return out[self._order]
        raise AssertionError("another signal than the clips'")

    def __call__(self, audio, sample_rate_hz, one_pass_s):
        assert sample_rate_hz == self.config.sample_rate_hz
        self.heard_s.append(len(audio) / sample_rate_hz)
        assert one_pass_s >= 10
        out = self.outputs(audio)
        return SimpleNamespace(talkers=out, count=int((np.square(out).mean(-1) > 0).sum()))


def test_clips_come_from_a_manifest_without_silent_sources(monkeypatch, tmp_path):
    lengths = [RATE, 3 * RATE, 4 * RATE, 5 * RATE, 6 * RATE]
    write_talkers(tmp_path / "set.jsonl", [TalkersSpec(f"c{i}", n, ()) for i, n in enumerate(lengths)])

    def render(corpus, manifest, keep):
        for spec in read_talkers(manifest):
            if keep(spec):
                sources = np.zeros((3, spec.frames))
                sources[1] = np.sin(np.arange(spec.frames))
                yield spec.id, sources.sum(0), sources, {"corpus": corpus.name}

    monkeypatch.setattr("allears.data.talkers_render.render_talker_set", render)
    found = list(from_manifest(tmp_path, tmp_path / "set.jsonl", limit=2, shortest_s=3))
    assert [clip.id for clip in found] == ["c1", "c3"] and found[0].facts == {"corpus": tmp_path.name}
    assert found[0].sources.shape == (1, 3 * RATE) and found[0].mixture.dtype == np.float32
    assert len(list(from_manifest(tmp_path, tmp_path / "set.jsonl"))) == 5
    narrow = found[0].at_rate(8_000)
    assert narrow.mixture.shape == (3 * 8_000,) and narrow.rate_hz == 8_000
    assert narrow.sources[0] == pytest.approx(narrow.mixture) and narrow.cut(8_000, 4_000).sources.shape == (1, 4_000)


def test_si_snr_takes_means_off_and_has_a_floor():
    one, other = voices(2, 0.5).astype(np.float64)
    orthogonal = other - one * (other @ one) / (one @ one)
    orthogonal *= np.sqrt(one @ one / (orthogonal @ orthogonal)) / 10
    assert si_snr_db(3 * one + 3 * orthogonal + 5.0, one) == pytest.approx(20, abs=0.01)
    assert si_snr_db(np.zeros(8000), one) == FLOOR_DB
    assert si_snr_db(np.stack([one, orthogonal])[:, None], one[None]).shape == (2, 1)


def test_the_best_of_all_assignments_is_taken_for_the_whole_stretch():
    a, b, c = voices(3, 0.5)
    order, scores = assign(np.stack([0.1 * a, c, b + 0.1 * a]), np.stack([a, b]))
    assert order.tolist() == [0, 2] and scores[0] > 100 and scores[1] == pytest.approx(20, abs=1)
    # the best output of both talkers is the first: the sum decides
    order, _ = assign(np.stack([a + b, 0.9 * a + 1.1 * b, c]), np.stack([a, b]))
    assert order.tolist() == [0, 1]
    with pytest.raises(ValueError, match="outputs: 1 for 2 talkers"):
        assign(a[None], np.stack([a, b]))


def test_sdr_forgives_a_filter_of_512_taps_and_nothing_else():
    one, other = np.random.default_rng(1).standard_normal((2, 16_000))
    one[-600:] = 0
    filtered = np.convolve(one, np.r_[np.zeros(100), 1.0, np.zeros(300), -0.5])[:16_000]
    noise = other * np.sqrt(filtered @ filtered / (other @ other)) / 10**0.75
    assert sdr_db(filtered + noise, one) == pytest.approx(15, abs=0.3)
    assert si_snr_db(filtered + noise, one) < 0
    late = np.roll(one, 600)
    assert sdr_db(late, one) < -10 and sdr_db(np.zeros(100), one[:100]) == FLOOR_DB


def test_gains_are_over_the_mixture_and_one_talker_has_none():
    sources = voices(2, 1)
    clip = clip_of(sources)
    scores, order = separation_scores(np.stack([sources[1] + 0.1 * sources[0], sources[0], 0 * sources[0]]), clip)
    assert order.tolist() == [1, 0]
    before = si_snr_db(clip.mixture, sources).mean()
    assert scores["si_snri_db"] == pytest.approx(scores["si_snr_db"] - before) and scores["sdri_db"] > 20
    alone = clip_of(sources[:1])
    assert list(separation_scores(sources, alone)[0]) == ["si_snr_db"]


def test_long_stretches_keep_one_order_and_leave_pauses_out():
    sources = voices(2, 4)
    clip = clip_of(sources)
    outputs = sources + 0.1 * sources[::-1]
    swapped = outputs.copy()
    swapped[:, -RATE:] = outputs[::-1, -RATE:]
    kept, lost = (long_scores(found, clip, RATE) for found in (outputs, swapped))
    assert kept["window_si_snri_db"] == pytest.approx(20, abs=0.2) == kept["si_snri_db"]
    assert lost["window_si_snri_db"] == pytest.approx((3 * 20 - 20) / 4, abs=0.2)  # a window of four is swapped
    assert lost["si_snri_db"] == pytest.approx(10 * np.log10(0.775**2 / (1.01 - 0.775**2)), abs=0.2)
    pausing = sources.copy()
    pausing[1, RATE:] *= 1e-3
    found = long_scores(outputs, clip_of(pausing), RATE)
    assert found["window_si_snri_db"] == pytest.approx(20, abs=1)  # of the first window alone
    assert np.isnan(long_scores(sources, clip_of(sources * [[1], [1e-3]]), RATE)["si_snri_db"])


@pytest.fixture
def quality(monkeypatch, tmp_path):
    """Sets of two clips each, a good and a poor system at 16 kHz, and one with two outputs at 8 kHz."""
    clips = {
        "clean2": [clip_of(voices(2, 1, seed), f"two-{seed}", room="dry") for seed in range(2)],
        "clean3": [clip_of(voices(3, 1, seed), f"three-{seed}") for seed in range(2)],
        "clean1": [clip_of(voices(1, 1, seed), f"one-{seed}") for seed in range(2)],
        "long2": [clip_of(voices(2, seconds, seconds), f"long-{seconds}s") for seconds in (4, 2, 5)],
    }
    every = [clip for part in clips.values() for clip in part]
    systems = {
        "good": FakeSeparator(every, 0.01),
        "poor": FakeSeparator(every, 0.1, order=(2, 1, 0)),
        "narrow": FakeSeparator(clips["clean2"] + clips["long2"], 0.1, 2, 8_000, silent_outputs=False),
    }
    for name in clips:
        (tmp_path / f"separate-{name}.jsonl").write_text("{}\n" * 2)
    monkeypatch.setattr("benchmarks.separate.load", lambda path, device: systems[path])
    monkeypatch.setattr(
        "benchmarks.separate.from_manifest",
        lambda corpus, manifest, limit, shortest_s: iter(clips[manifest.stem[9:]][:limit]),
    )
    for module in ("benchmarks.separate", "benchmarks.separate_scores"):
        monkeypatch.setattr(f"{module}.LENGTHS_S", (1, 2, 4))

    def run(*names, **options):
        case = SeparateCase(
            tuple(f"{name}={name}" for name in names),
            sets_folder=tmp_path,
            out=tmp_path / "csv",
            results_folder=tmp_path / "json",
            **options,
        )
        assert case.run() == 0
        document = json.loads((tmp_path / "json" / "separate.json").read_text())
        return {(r["case"], r["system"], r["metric"]): r for r in document["rows"]}, document["notes"]

    run.systems = systems
    run.csv = tmp_path / "csv" / "separate.csv"
    return run


def test_rows_of_each_case_system_and_difference(quality):
    found, notes = quality("good", "poor", "narrow")
    cases = {which: {s for c, s, _ in found if c == which} for which in dict.fromkeys(c for c, *_ in found)}
    both = {"mixture", "good", "poor", "poor_minus_good"}
    lengths = {"good", "poor", "poor_minus_good", "narrow"}
    assert cases == {
        "clean2-8k": {"mixture", "narrow"},
        "clean2-16k": both,
        "clean3-16k": both,
        "clean1-16k": {"good", "poor"},
        "count-16k": {"good", "poor"},
        **{f"clean2-{seconds}s": lengths for seconds in (1, 2, 4)},
    }
    good, poor = (found["clean2-16k", name, "si_snri_db"] for name in ("good", "poor"))
    assert good["value"] == pytest.approx(40, abs=0.5) and poor["value"] == pytest.approx(20, abs=0.5)
    assert good["n"] == 2 and good["low"] <= good["value"] <= good["high"]
    assert found["clean2-16k", "poor_minus_good", "si_snri_db"]["value"] == pytest.approx(-20, abs=0.2)
    assert found["clean2-8k", "narrow", "si_snri_db"]["value"] == pytest.approx(20, abs=0.5)
    assert found["clean2-16k", "mixture", "si_snr_db"]["value"] == pytest.approx(0, abs=0.5)
    assert ("clean2-16k", "mixture", "si_snri_db") not in found
    assert ("clean1-16k", "good", "si_snri_db") not in found
    assert any("noisy2: left out: separate-noisy2.jsonl does not exist" in note for note in notes)
    assert "good: 3.71 M parameters, sepreformer, attention fla, 16000 Hz, 3 outputs" in notes
    with quality.csv.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 2 * 3 + 2 * 2 + 3 * 3 * 2  # sets, clips, mixture and systems; 8 kHz; lengths
    assert lines[0]["clip"] == "clean2-8k/two-0" and lines[0]["room"] == "dry"


def test_the_count_is_that_of_talkers_who_are_there(quality):
    quality.systems["good"].outputs = lambda mixture: np.ones((3, len(mixture)), np.float32) * mixture
    found, _ = quality("good", "narrow", sets=("clean1", "clean2", "clean3"))
    counts = {which: row["value"] for (which, system, metric), row in found.items() if metric == "count_accuracy"}
    assert counts == {"clean1-16k": 0, "clean2-16k": 0, "clean3-16k": 1, "count-16k": pytest.approx(1 / 3, rel=1e-4)}


def test_lengths_are_pieces_of_the_same_clips_each_heard_at_once(quality):
    found, _ = quality("poor", sets=("long2",))
    assert quality.systems["poor"].heard_s == 2 * [1, 1, 1, 1, 2, 2, 4]  # of the clips of 4 and 5 s; none of 2 s
    for seconds in (1, 2, 4):
        assert found[f"clean2-{seconds}s", "poor", "si_snri_db"]["value"] == pytest.approx(20, abs=0.5)
    cost = found["clean2-4s", "poor", "window_si_snri_db_minus_1s"]
    assert cost["value"] == pytest.approx(0, abs=1e-3) and cost["n"] == 2


def test_voice_metrics_are_means_over_talkers_with_gains(quality):
    found, _ = quality("good", sets=("clean2",), metrics=("si_sdr_db",), workers=1)
    row = found["clean2-16k", "good", "si_sdr_db_gain"]
    assert row["value"] == pytest.approx(40, abs=0.5) and row["n"] == 2
    assert ("clean2-16k", "good", "si_snr_db_gain") not in found


def test_wrong_names_are_refused(quality):
    with pytest.raises(ValueError, match=r"sets: \['clean9'\] given; known are clean2"):
        quality("good", sets=("clean9",))
    with pytest.raises(ValueError, match="none of them named mixture"):
        SeparateCase(("mixture=x",)).run()


def test_outputs_that_are_not_finite_are_named(quality):
    quality.systems["good"].outputs = lambda mixture: np.full((3, len(mixture)), np.nan)
    with pytest.raises(ValueError, match="two-0: the outputs hold NaN"):
        quality("good", sets=("clean2",))


def test_differences_need_the_same_clips():
    values, others = {"a": 3.0, "b": 5.0, "c": 9.0}, {"b": 4.0, "a": 1.0}
    row = separate_scores.paired_row("case", "x_minus_y", "si_snri_db", values, others)
    assert (row["value"], row["n"]) == (1.5, 2)


@pytest.fixture
def conversation():
    """24 s: the first talker at 1-4, 9-12 and 17-20 s, the second at 5-8, 11-15 and 21-23 s."""
    sources = voices(2, 24)
    for source, spans in zip(sources, ([(1, 4), (9, 12), (17, 20)], [(5, 8), (11, 15), (21, 23)]), strict=True):
        on = np.zeros(len(source), bool)
        for begin, end in spans:
            on[begin * RATE : end * RATE] = True
        source[~on] = 0
    return clip_of(sources)


def test_spurts_are_stretches_of_speech(conversation):
    found = spurts(conversation)
    seconds = [[(round(a / RATE, 1), round(b / RATE, 1)) for a, b in own] for own in found]
    assert seconds == [[(1, 4), (9, 12), (17, 20)], [(5, 8), (11, 15), (21, 23)]]
    whole = clip_of(voices(2, 12))
    assert [len(own) for own in spurts(whole)] == [3, 3]  # 12 s in three parts of 4 s


def test_a_swap_is_a_change_of_the_output_between_spurts(conversation):
    sources = conversation.sources
    own = spurts(conversation)
    outputs = np.concatenate([sources[::-1] + 0.01 * sources, 1e-3 * voices(1, 24, seed=5)])
    assert holders(outputs, sources[0], own[0]) == [1, 1, 1] and holders(outputs, sources[1], own[1]) == [0, 0, 0]
    swapped = outputs.copy()
    swapped[:2, 16 * RATE :] = outputs[1::-1, 16 * RATE :]  # both change their output after 16 s, and stay there
    assert holders(swapped, sources[0], own[0]) == [1, 1, 0]
    tally = Tally()
    tally.add(outputs, conversation)
    tally.add(swapped, conversation)
    assert tally.swaps == [0, 2] and tally.turns == [6, 6] and tally.shared == [False, False]
    rows = {row["metric"]: row for row in tally.rows("all", "x")}
    assert rows["swaps"]["value"] == 2 and rows["spurts"]["value"] == 12 and rows["si_snri_db"]["n"] == 2
    assert tally.gains_db[0] > 20 > tally.gains_db[1]
    assert count_swaps([0, 1, 0, 0]) == 2 and count_swaps([2]) == count_swaps([]) == 0


def test_two_talkers_on_one_output_show_though_nobody_swaps(conversation):
    tally = Tally()
    tally.add(conversation.mixture[None], conversation)  # the second output is missing: the mixture again
    assert tally.swaps == [0] and tally.shared == [True] and tally.gains_db == [pytest.approx(0)]


def test_the_three_ways_to_hear_a_conversation(conversation, monkeypatch, tmp_path):
    separator = FakeSeparator([conversation], 0.01)
    flips = iter([False, True, True])

    def net(part):
        out = separator.outputs(part[0].numpy())
        return torch.from_numpy(out[[1, 0, 2]] if next(flips) else out)[None]

    separator.net = net
    out = join_blindly(separator, conversation, 8 * RATE)
    assert out.shape == (3, 24 * RATE)
    assert holders(out, conversation.sources[0], spurts(conversation)[0]) == [1, 0, 0]

    separator.net = lambda part: torch.from_numpy(separator.outputs(part[0].numpy()))[None]
    monkeypatch.setattr("benchmarks.separate_conversation.load", lambda weights, device: separator)
    monkeypatch.setattr(
        "benchmarks.separate_conversation.from_manifest",
        lambda corpus, manifest: (conversation._replace(id=f"conversation-{name}") for name in ("clean", "noisy")),
    )
    assert SeparateConversationCase(results_folder=tmp_path).run() == 0
    document = json.loads((tmp_path / "separate_conversation.json").read_text())
    found = {(r["case"], r["system"], r["metric"]): r["value"] for r in document["rows"]}
    for system in ("allears", "allears-30s-windows", "no-stitching"):
        for which, spurts_there in (("conversation", 12), ("conversation-clean", 6), ("conversation-noisy", 6)):
            assert found[which, system, "swaps"] == 0 and found[which, system, "spurts"] == spurts_there
            assert found[which, system, "si_snri_db"] == pytest.approx(40, abs=2)


def test_speed_of_files_and_of_the_network_alone(tmp_path, monkeypatch):
    registry.load_all()
    monkeypatch.setattr(SeparateSpeedCase, "_export", lambda self, path: 1e-6)
    measured = []

    def measure(self, job, source, folder):
        measured.append((job.system.name, job.seconds, job.repeats, set(job.options)))
        return {"seconds": job.seconds / 4, "peak_rss_gb": 0.5, "how": "somehow"}

    monkeypatch.setattr(SeparateSpeedCase, "_measure", measure)
    case = SeparateSpeedCase(seconds=(1, 2), weights="w", results_folder=tmp_path)
    assert case.run() == 0
    weights = {"name_or_folder"}
    assert measured == [
        ("allears", 1, 1, weights),
        ("allears", 2, 1, weights),
        ("network", 10, 5, weights),
        ("onnx", 10, 5, {"path"}),
    ]
    document = json.loads((tmp_path / "separate_speed.json").read_text())
    found = {(r["case"], r["system"], r["metric"]): r["value"] for r in document["rows"]}
    assert found["2s", "allears", "rtf"] == found["10s", "onnx", "rtf"] == 0.25 and len(found) == 8
    assert any("differ from PyTorch's by 1e-06" in note for note in document["notes"])


@pytest.mark.parametrize(("error", "word"), [(ImportError("no onnx"), "MISSING"), (KeyError("no onnx"), "FAILED")])
def test_without_an_export_the_rest_is_measured(tmp_path, monkeypatch, error, word):
    def fails(self, path):
        raise error

    monkeypatch.setattr(SeparateSpeedCase, "_export", fails)
    monkeypatch.setattr(SeparateSpeedCase, "_measure", lambda *_: {"seconds": 1, "peak_rss_gb": 1, "how": ""})
    SeparateSpeedCase(seconds=(1,), results_folder=tmp_path).run()
    document = json.loads((tmp_path / "separate_speed.json").read_text())
    assert {r["system"] for r in document["rows"]} == {"allears", "network"}
    assert f"onnx: {word}: {error}" in document["notes"]
