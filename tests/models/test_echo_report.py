"""What the report of the echo canceller says of a run, against signals for which it is known."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from allears.audio.report import CLIP_S, render_report
from allears.models.echo.report import (
    MOST_DB,
    Heard,
    attenuation,
    echo_blocks,
    entry,
    hear,
    steady_delay_ms,
    voice_blocks,
)
from allears.models.echo.result import DelayMap, EchoResult
from allears.models.echo.stream import Facts

RATE = 8_000
HOP_S = 0.01


def result(seconds, delay_ms=None, confidence=None, voice=None, alignment=None, notes=()):
    """Of a run with one microphone; values are one a second, and stand for its 100 frames."""
    rows = [None if v is None else np.repeat(np.float32(v), 100)[None] for v in (delay_ms, confidence, voice)]
    frames = int(seconds * RATE)
    return EchoResult(seconds, 1.0, RATE, 1, frames, Facts(*rows), HOP_S, alignment, notes)


def powers(mic, reference, output, playing):
    """What was heard of one second of each value, in 20 ms blocks."""
    rows = np.repeat(np.array([mic, reference, output], float), 50, axis=1)
    clip = np.zeros((3, 100), np.float32)
    return Heard(clip, rows, 0.02, playing, RATE, len(mic), 1)


def test_the_echo_comes_by_the_delay_later():
    heard = powers([1, 1, 1], [1, 1, 1], [1, 1, 1], playing=((0.0, 1.0),))
    shifted = echo_blocks(heard, result(3, delay_ms=[500, 500, 500], confidence=[1, 1, 1]))
    assert np.flatnonzero(shifted).tolist() == list(range(25, 75))
    np.testing.assert_array_equal(np.flatnonzero(echo_blocks(heard, None)), np.arange(50))
    np.testing.assert_array_equal(echo_blocks(heard, result(3)), echo_blocks(heard, None))


def test_a_delay_that_is_not_sure_is_that_of_before():
    found = steady_delay_ms(result(4, delay_ms=[900, 100, 700, 200], confidence=[0.1, 0.9, 0.2, 0.6]))
    np.testing.assert_array_equal(found[::100], [100, 100, 100, 200])
    assert not steady_delay_ms(result(2, delay_ms=[900, 100], confidence=[0.1, 0.2])).any()


def test_attenuation_is_apart_for_echo_alone_and_with_voice():
    heard = powers([1, 1, 1, 1e-9], [1] * 4, [1e-3, 0.5, 1.0, 1e-12], playing=((0.0, 2.0), (3.0, 4.0)))
    run = result(4, voice=[0.1, 0.9, 0.9, 0.1])
    echoed, voiced = echo_blocks(heard, run), voice_blocks(heard, run)
    found = attenuation(heard, echoed, voiced, 4.0, points=4)
    np.testing.assert_allclose(found.times_s, [0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(found.alone_db, [30, np.nan, np.nan, np.nan])  # too quiet a microphone tells nothing
    np.testing.assert_allclose(found.both_db, [np.nan, 10 * np.log10(2), np.nan, np.nan])
    blind = attenuation(heard, echoed, None, 2.0, points=2)
    np.testing.assert_allclose(blind.both_db, [30, 10 * np.log10(2)])
    assert np.isnan(blind.alone_db).all()
    silent = attenuation(replace(heard, powers=heard.powers * [[1], [1], [0]]), echoed, voiced, 4.0, points=4)
    assert silent.alone_db[0] == MOST_DB


def test_points_are_long_enough_to_be_read():
    heard = powers([1.0] * 20, [1.0] * 20, [0.1] * 20, playing=((0.0, 20.0),))
    found = attenuation(heard, echo_blocks(heard, None), None, 20.0)
    assert len(found.times_s) == 84 and np.diff(found.times_s) == pytest.approx(0.24)
    np.testing.assert_allclose(found.both_db, 10.0)


@pytest.mark.parametrize("stereo", [False, True])
def test_files_are_heard_as_the_network_hears_them(tmp_path, stereo):
    rng = np.random.default_rng(0)
    mic, played = 0.1 * rng.standard_normal((2, 4100)), 0.2 * rng.standard_normal((2, 2000))
    near = 0.5 * mic
    place = [tmp_path / name for name in ("mic.wav", "ref.wav", "out.wav")]
    padded = np.pad(played.mean(0), (0, 2100))
    soundfile.write(place[0], np.vstack([padded, mic]).T if stereo else mic.T, RATE, "FLOAT")
    soundfile.write(place[1], played.T, RATE, "FLOAT")
    soundfile.write(place[2], near.T, RATE, "FLOAT")
    heard = hear(place[0], None, place[2], 1) if stereo else hear(*place)
    np.testing.assert_allclose(heard.clip, np.vstack([mic, padded, near]), atol=1e-6)
    assert heard.mics == 2 and heard.duration_s == 4100 / RATE and heard.powers.shape == (3, 26)
    np.testing.assert_allclose(heard.powers[0, :25], np.square(mic[0, :4000]).reshape(25, 160).mean(1), rtol=1e-5)
    np.testing.assert_allclose(heard.powers[2] / heard.powers[0], 0.25, rtol=1e-5)
    ((begin, end),) = heard.playing
    assert begin == 0 and end == pytest.approx(2000 / RATE, abs=0.02)


def test_the_card_says_what_was_found():
    heard = powers([1, 1, 1], [1, 1, 1], [1e-3, 1e-3, 0.5], playing=((0.0, 3.0),))
    heard = replace(heard, clip=np.zeros((3, 3 * RATE), np.float32))
    weights = np.zeros((300, 100), np.float32)
    weights[:, 20] = 1.0
    run = result(3, [200] * 3, [0.9, 0.9, 0.1], [0.1, 0.1, 0.9], DelayMap(weights, 0.01, 10.0), ("it drifts <1 %",))
    card = entry("rec/a.wav", heard, run, {"reference": "rec/b.wav"})
    assert [track.name for track in card.tracks] == ["microphone", "reference", "output"]
    assert card.facts["attenuation, far end alone"] == "30.0 dB over 1.8 s"
    assert card.facts["attenuation, both talk"] == "3.0 dB over 1.0 s"
    assert card.facts["near end speaks"] == "1.0 s" and card.facts["note 1"] == "it drifts <1 %"
    assert card.facts["delay found"] == "200 ms (mostly 200 to 200), sure for 64% of the echo"
    delay, level, active = card.panels
    assert (delay.high, delay.unit, delay.picture.values.shape, delay.picture.end_s) == (1000, "ms", (100, 300), 3.0)
    assert delay.picture.values[20].min() == 1.0 and delay.curves[0].values[50] == 205  # the middle of its row
    assert np.isnan(delay.curves[0].values[250])
    assert (level.low, level.high) == (0, 30) and [curve.faint for curve in level.curves] == [False, True]
    assert [(row.name, row.spans) for row in active.rows] == [("reference", ((0.0, 3.0),)), ("near end", [(2.0, 3.0)])]
    page = render_report("Echo, cancelled", [card])
    assert "it drifts &lt;1 %" in page and page.count('class="panel"') == 3 and "The whole recording" not in page


def test_an_earlier_run_is_shown_without_what_it_did_not_leave():
    heard = powers([1] * 40, [1] * 40, [0.1] * 40, playing=((0.0, 40.0),))
    heard = replace(heard, clip=np.zeros((3, int(CLIP_S * RATE)), np.float32))
    card = entry("a.wav", heard, None, {"finished": "by an earlier run"})
    assert [panel.name for panel in card.panels] == ["Attenuation while the reference plays", "Activity"]
    assert len(card.panels[0].curves) == 1 and len(card.panels[1].rows) == 1
    assert "delay found" not in card.facts and card.facts["finished"] == "by an earlier run"
    page = render_report("x", [card])
    assert "The whole recording" in page and page.count('class="panel"') == 4
