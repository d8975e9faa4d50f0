"""The page in a real Chromium, whose microphone hears an echo: it streams, shows what it should, and copes with no."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
from tests.serve.chromium import browser, find_chromium
from tests.serve.stubs import Client, Made, Subtract, make_hall, running, wait_for

from allears.models.echo.config import PRESETS
from allears.serve.app import PAGE

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: install the package chromium")

CONFIG = replace(PRESETS["test"], align_frames=20)
LISTEN_IN = """
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = (wanted) => { window.asked = wanted.audio; return ask(wanted); };
const play = AudioContext.prototype.createBuffer;
AudioContext.prototype.createBuffer = function (...given) { window.heard = given[1]; return play.apply(this, given); };
"""
BRIGHT = """(() => {
  const spectrum = document.querySelector('#%s .spectrum');
  const { data } = spectrum.getContext('2d').getImageData(0, 0, spectrum.width, spectrum.height);
  let bright = 0;
  for (let i = 0; i < data.length; i += 4) bright += data[i] > 100;
  return bright;
})()"""


class Damp(Subtract):
    """A twentieth of the microphone, 26 dB less; keeps the energy of what was played."""

    name, config = "damp", CONFIG

    def __init__(self):
        super().__init__()
        self.played = 0.0

    def run(self, hops):
        self.played += sum(float(np.square(hop.spectra[1]).sum()) for hop in hops) / CONFIG.hop  # after Parseval
        found = np.eye(CONFIG.align_frames, dtype=np.float32)[7]
        return [Made(0.05 * hop.spectra[0], found, -4.0, hop.state) for hop in hops]


@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    """What it hears: the voice 70 ms late, from the beginning of the recording."""
    voice, rate = soundfile.read(PAGE / "voice.flac", dtype="float32")
    heard = np.concatenate([np.zeros(7 * rate // 100, np.float32), 0.5 * voice])
    path = tmp_path_factory.mktemp("microphone") / "echo.wav"
    soundfile.write(path, np.repeat(heard, 3), 3 * rate, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def tab(microphone):
    with browser(microphone) as tab:
        yield tab


def text(tab, name):
    return tab.value(f"document.getElementById('{name}').textContent")


def press(tab, name):
    tab.value(f"document.getElementById('{name}').click()")


def test_the_page_streams_and_shows_the_echo_go(tab, tmp_path):
    steps = Damp()
    hall = make_hall(steps=steps)
    with running(hall) as address:
        tab.go(f"http://{address}/")
        tab.value(LISTEN_IN)
        assert text(tab, "status") == "Not running." and text(tab, "attenuation") == "–"
        press(tab, "hear")
        press(tab, "start")
        tab.wait_for("document.body.dataset.received > 16000 * 1.6")
        assert tab.value("document.body.dataset.state") == "running" and "damp" in text(tab, "status")
        asked = tab.value("window.asked")
        assert [asked[name] for name in ("echoCancellation", "noiseSuppression", "autoGainControl")] == [False] * 3
        assert float(text(tab, "attenuation")) == pytest.approx(26.0, abs=0.3)
        assert text(tab, "delay") == "70" and text(tab, "voice") == "no" and float(text(tab, "took")) > 0
        assert steps.played > 10.0
        bright = {name: tab.value(BRIGHT % name) for name in ("played", "heard", "result")}
        assert min(bright["played"], bright["heard"]) > 200 and bright["result"] < bright["heard"] / 2
        level = {name: tab.value(f"document.querySelector('#{name} meter').value") for name in bright}
        assert level["heard"] > level["result"] + 10
        sent, received = (int(tab.value(f"document.body.dataset.{name}")) for name in ("sent", "received"))
        assert 0 <= sent - received < 16_000
        tab.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        press(tab, "start")
        wait_for(lambda: hall.running == 0)
        assert text(tab, "status") == "Stopped." and text(tab, "start") == "Start"
        press(tab, "after")
        assert tab.value("window.heard") >= received
        assert hall.metrics.closed == {1000: 1} and not hall.metrics.faults.total()
    assert tab.complaints == []


def test_the_page_says_that_the_server_is_full_and_that_it_stops(tab):
    hall = make_hall(most=1, steps=Damp())
    with running(hall) as address:
        with Client(address) as client:
            client.begin()
            tab.go(f"http://{address}/")
            press(tab, "start")
            tab.wait_for("document.body.dataset.state === 'failed'")
            assert text(tab, "status") == "all 1 places are taken: try again later. (1013)"
            assert text(tab, "start") == "Start"
        wait_for(lambda: hall.running == 0)
        press(tab, "start")
        tab.wait_for("document.body.dataset.state === 'running' && document.body.dataset.received > 0")
    tab.wait_for("document.body.dataset.state === 'failed'")
    assert text(tab, "status") == "the server is stopping. (1001)"
