import json

import numpy as np
import pytest

from allears.audio.metrics import echo_clip
from allears.audio.metrics.aecmos import Aecmos
from allears.audio.metrics.echo_clip import ECHO_METRICS, EchoTruth, score_echo
from allears.cli import eval_echo
from allears.cli.eval_echo import DELAYS_MS, Echo, grid, kalman, means
from allears.cli.main import main

RATE = 16_000


def truth_of(scenario, seconds=4.0, seed=0, changed_s=None):
    """The far end comes back 20 ms later at half its size; the near end pauses in the last second."""
    near, far = (0.1 * np.random.default_rng(seed).standard_normal((2, int(seconds * RATE)))).astype(np.float32)
    near = near * (scenario != "far") * (np.arange(len(near)) < (seconds - 1) * RATE)
    far = far * (scenario != "near")
    echo = np.concatenate([np.zeros(320, np.float32), 0.5 * far])[: len(far)]
    frames = -(-len(near) // 160) + 1
    voice = (np.arange(frames) < 100 * (seconds - 1)) & (scenario != "far")
    far_active = np.full(frames, scenario != "near")
    delays = np.full(frames, 2)
    return EchoTruth(scenario, near + echo, far, near, near, delays, voice, far_active, changed_s)


@pytest.fixture
def opinions(monkeypatch):
    """Networks and PESQ that say a number at once."""
    monkeypatch.setattr(echo_clip, "aecmos", lambda mic, reference, output, scenario: Aecmos(4.0, 3.0))
    monkeypatch.setattr(echo_clip, "pesq_wb", lambda output, reference, rate: 2.5)
    monkeypatch.setattr(echo_clip, "voiced_share", lambda output, frames, hop: 0.25)
    monkeypatch.setattr(echo_clip, "find_spec", lambda name: None)


def told(scores):
    return {metric for metric, value in scores.items() if not np.isnan(value)}


def test_each_scenario_has_the_metrics_that_say_something_of_it(opinions, monkeypatch):
    far, both, near = (truth_of(scenario) for scenario in ("far", "double", "near"))
    of_far = {"erle_db", "time_to_20db_s", "reached_20db", "aecmos_echo", "aecmos_deg"}
    of_near = {m for m in ECHO_METRICS if m.startswith(("pesq", "si_sdr", "sdr512"))} | {"aecmos_deg"}
    assert told(score_echo(far, 0.01 * far.mic)) == of_far
    assert told(score_echo(near, near.mic)) == of_near
    assert told(score_echo(both, both.near, both.delay_frames)) == of_near | {"aecmos_echo", "erle_db", "aligned_share"}
    monkeypatch.setattr(echo_clip, "find_spec", lambda name: "there")
    changed = far._replace(changed_s=2.0)
    assert told(score_echo(changed, 0.01 * far.mic)) == of_far | {"self_trigger", "recovery_s"}
    assert list(score_echo(near, near.mic)) == list(ECHO_METRICS)


def test_values_and_their_bounds(opinions):
    far = truth_of("far", changed_s=3.0)
    scores = score_echo(far, np.where(np.arange(len(far.mic)) < RATE, 1.0, 0.01).astype(np.float32) * far.mic)
    assert scores["erle_db"] == pytest.approx(40) and scores["reached_20db"] == 1
    assert scores["time_to_20db_s"] == pytest.approx(1.0, abs=0.03) and scores["recovery_s"] == 0
    never = score_echo(far, far.mic)
    assert (never["time_to_20db_s"], never["reached_20db"], never["erle_db"]) == (4.0, 0.0, 0.0)
    assert score_echo(far, 0 * far.mic)["erle_db"] == 100
    both = truth_of("double")
    assert score_echo(both, both.near)["si_sdr_db"] == 100 and score_echo(both, 0 * both.near)["si_sdr_db"] == -30
    # ERLE is that of the last second, in which the near end pauses
    out = np.where(np.arange(len(both.mic)) < 3 * RATE, 1.0, 0.1).astype(np.float32) * both.mic
    assert score_echo(both, out)["erle_db"] == pytest.approx(20, abs=0.2)
    off = both.delay_frames + 2
    off[:100] -= 1
    assert score_echo(both, both.near, off)["aligned_share"] == pytest.approx(100 / 401)


def test_the_better_fitting_near_end_counts_for_the_filtered_ratio(opinions):
    both = truth_of("double")
    late = np.concatenate([np.zeros(6_400, np.float32), 0.5 * both.near])[: len(both.near)]
    wet = both._replace(near_reverberant=both.near + late)
    scores = score_echo(wet, wet.near_reverberant)
    assert scores["sdr512_db"] == 100 and scores["si_sdr_reverberant_db"] == 100
    assert scores["si_sdr_db"] == pytest.approx(6, abs=0.5)


def test_the_grid_is_that_of_the_specification():
    sizes = {name: len(grid(name)) for name in ("far", "near", "double", "path")}
    assert sizes == {"far": 28, "near": 2, "double": 84, "path": 84}
    cells = grid("path", clips=2)
    assert len({cell.name for cell in cells}) == len(cells) == 168 and all(cell.moves for cell in cells)
    assert {cell.delay_ms for cell in cells} == set(DELAYS_MS) and {cell.scenario for cell in cells} == {"double"}
    few = grid("far", limit=7)
    assert [cell.delay_ms for cell in few] == list(DELAYS_MS)
    with pytest.raises(ValueError, match="limit: got 0"):
        grid("far", limit=0)


def test_the_linear_filter_is_told_the_delay():
    far = truth_of("far", seconds=2.0)
    late = far._replace(
        mic=np.concatenate([np.zeros(8_000, np.float32), far.mic])[: len(far.mic)], delay_frames=far.delay_frames + 50
    )
    output, delays = kalman()(late)
    assert delays is None and score_ratio(late.mic, output) > 20


def score_ratio(mic, output):
    return 10 * np.log10(np.square(mic[RATE:]).sum() / np.square(output[RATE:]).sum())


def test_means_leave_out_what_no_clip_has():
    found = means([{"a": 1.0, "b": np.nan}, {"a": 3.0, "b": np.nan}])
    assert list(found) == ["a"] and found["a"].mean == 2.0 and found["a"].n == 2


@pytest.fixture
def simulated(monkeypatch):
    def rendered(self, cells):
        for index, cell in enumerate(cells):
            yield cell.name.partition("-")[0], cell.delay_ms, truth_of(cell.scenario, seed=index)

    monkeypatch.setattr(Echo, "_rendered", rendered)
    monkeypatch.setattr(eval_echo, "model", lambda name, device: lambda truth: (0.1 * truth.near, truth.delay_frames))


def test_the_verb_scores_every_system_on_the_same_clips(opinions, simulated, capsys):
    command = Echo(systems=("input", "model"), scenarios=("far", "double"), limit=2, cells=True, json=True, seed=3)
    assert command.run() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seed"] == 3 and document["clips"] == 4
    scores = document["scores"]
    assert set(scores) == {"far", "far 0 ms", "far 120 ms", "double", "double 0 ms", "double 120 ms"}
    assert scores["far"]["input"]["erle_db"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    assert scores["double"]["model"]["si_sdr_db"]["mean"] == 100 and scores["double"]["input"]["si_sdr_db"]["mean"] < 10
    assert scores["double"]["model"]["aligned_share"]["mean"] == 1 and "aligned_share" not in scores["double"]["input"]
    command.json = False
    command.run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "far: 2 clips, mean and 95 % interval" and lines[2].startswith("input")


@pytest.mark.parametrize(
    ("options", "message"), [({"clips": 0}, "clips: got 0"), ({"systems": ()}, "systems, scenarios: got none")]
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Echo(**options).run()


def test_a_model_that_is_not_there_is_one_line(capsys, tmp_path):
    assert main(["eval", "echo", "--systems", "model", "--model", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) >= 1


def test_the_model_tells_the_delay_of_each_frame(monkeypatch):
    from types import SimpleNamespace

    class Model:
        @classmethod
        def from_pretrained(cls, device):
            return cls()

        def __call__(self, mic, reference, rate, on_facts):
            assert rate == RATE
            for part in (np.full((1, 300), 20.0), np.full((1, 99), 30.0)):
                on_facts(SimpleNamespace(delay_ms=part))
            return mic

    monkeypatch.setattr("allears.models.echo.EchoCanceller", Model)
    truth = truth_of("far")
    output, delays = eval_echo.model(None, "cpu")(truth)
    assert output is truth.mic and delays.shape == (401,)
    assert (delays[:300] == 2).all() and (delays[300:] == 3).all()
