"""The report page and its pictures: parsed and decoded again, and compared with what went in."""

import base64
import io
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from allears.audio.report import CLIP_S, ReportEntry, Track, clock, is_report, render_report, write_report
from allears.audio.spectrogram import (
    FLOOR_DB,
    colour_map,
    encode_png,
    level_range_db,
    spectrogram_db,
    spectrogram_png,
)


def decode_png(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """An indexed PNG as (H, W) indices and its palette, every checksum checked; the inverse of ``encode_png``."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, depth, colour_type, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour_type, rest) == (8, 3, [0, 0, 0])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)


class Page(HTMLParser):
    """Collects what the tests look at, and that every tag is closed."""

    VOID = frozenset(["meta", "img", "link", "br"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    def sources(self, tag: str, kind: str) -> list[bytes]:
        uris = [attributes["src"] or "" for name, attributes in self.tags if name == tag]
        assert all(uri.startswith(f"data:{kind};base64,") for uri in uris)
        return [base64.b64decode(uri.partition(",")[2]) for uri in uris]


def sine(frequency_hz: float, rate: int = 16000, seconds: float = 1.0, level: float = 1.0) -> np.ndarray:
    return level * np.sin(2 * np.pi * frequency_hz * np.arange(int(rate * seconds)) / rate)


def test_png_round_trip():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    got, colours = decode_png(encode_png(pixels, palette))
    np.testing.assert_array_equal(got, pixels)
    np.testing.assert_array_equal(colours, palette)


def test_png_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="pixels"):
        encode_png(np.zeros((2, 2), np.float32), colour_map())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="palette"):
        encode_png(np.full((2, 2), 3, np.uint8), colour_map()[:3])


def test_colours_grow_lighter_in_even_steps():
    linear = colour_map() / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    cone = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    lightness = cone @ np.array([0.2104542553, 0.7936177850, -0.0040720468])  # OKLab's L
    np.testing.assert_allclose(lightness, np.linspace(0.10, 0.95, 256), atol=0.02)


@pytest.mark.parametrize("level_db", [0.0, -20.0, -60.0])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_a_sine_stands_at_its_frequency_and_level(rate, level_db):
    tone_hz = 1000.0
    levels = spectrogram_db(sine(tone_hz, rate, level=10 ** (level_db / 20)), rate, columns=50, max_rows=10_000)
    middle = levels[:, 10:40]
    row_hz = rate / 2 / (len(levels) - 1)
    assert np.all(np.abs(middle.argmax(axis=0) * row_hz - tone_hz) <= row_hz)
    assert middle.max() == pytest.approx(level_db, abs=1.5)  # a Hann window loses up to 1.4 dB between two bins
    far = np.abs(np.arange(len(levels)) * row_hz - tone_hz) > 500
    assert middle[far].max() < level_db - 50


def test_time_runs_to_the_right_and_frequency_upwards():
    x = np.concatenate([np.zeros(8000), sine(6000, seconds=0.5)])
    pixels, _ = decode_png(spectrogram_png(spectrogram_db(x, 16000, columns=100), -80, 0))
    rows, columns = np.nonzero(pixels > 200)
    assert columns.min() >= 48
    height = 1 - rows / pixels.shape[0]
    assert np.all((height * 8000 > 5700) & (height * 8000 < 6300))


def test_rows_are_limited_and_short_or_broken_sound_is_drawn():
    assert spectrogram_db(np.zeros(48000), 48000).shape == (256, 900)
    assert spectrogram_db(np.array([0.5]), 16000, columns=3).shape == (256, 3)
    broken = np.array([[np.nan, np.inf, 0.0, -np.inf]] * 2)
    np.testing.assert_array_equal(spectrogram_db(broken, 8000, columns=4), np.float32(FLOOR_DB))


def test_long_sound_misses_no_moment():
    """A click of one sample is seen wherever it lies, although a column covers many windows."""
    for at in (3, 31_337, 159_000):
        x = np.zeros(160_000)
        x[at] = 1.0
        levels = spectrogram_db(x, 1000, columns=20)
        assert levels.max(axis=0).argmax() == at // 8000
        assert levels.max() > -90


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 0)), np.zeros((1, 1, 4))])
def test_shapes_that_are_no_sound_are_refused(bad):
    with pytest.raises(ValueError, match="samples: expected"):
        spectrogram_db(bad, 16000)


def test_colour_range_covers_the_loudest():
    quiet, loud = np.full((4, 5), -100.0, np.float32), np.full((4, 5), -22.0, np.float32)
    assert level_range_db([quiet, loud]) == (-100.0, -20.0)


def entry(**changes) -> ReportEntry:
    before = Track("input", sine(440) * 0.5, 16000, scores={"PESQ-WB": 1.5, "SI-SDR, dB": 3.0})
    after = Track("enhanced", sine(440) * 0.25, 16000, scores={"PESQ-WB": 2.75, "SI-SDR, dB": float("nan")})
    return ReportEntry(
        **{"title": "a <b>.wav", "tracks": [before, after], "elapsed_s": 0.2, "duration_s": 1.0, **changes}
    )


def test_page_is_self_contained_and_says_what_it_was_told():
    text = render_report("Speech & noise", [entry(facts={"room": "<hall>"})], {"model": "tiny", "steps": "4"})
    page = Page(text)
    assert "http://" not in text and "https://" not in text
    for told in ("Speech & noise", "a <b>.wav", "tiny", "4", "<hall>", "0.20 s", "0.200", "input", "enhanced"):
        assert told in page.texts
    at = page.texts.index("PESQ-WB")
    assert page.texts[at + 1 : at + 4] == ["1.50", "2.75", "+1.25"]
    at = page.texts.index("SI-SDR, dB")
    assert page.texts[at + 1] == "3.00" and page.texts[at + 2] != "nan"


def test_players_hold_the_sound_and_pictures_share_one_scale():
    page = Page(render_report("t", [entry()]))
    before, after = (soundfile.read(io.BytesIO(data)) for data in page.sources("audio", "audio/flac"))
    assert before[1] == after[1] == 16000
    np.testing.assert_allclose(before[0], sine(440) * 0.5, atol=1e-4)
    np.testing.assert_allclose(after[0], sine(440) * 0.25, atol=1e-4)
    loud, quiet = (decode_png(data)[0].astype(int) for data in page.sources("img", "image/png"))
    row = loud[:, 450].argmax()
    step_db = (loud[row, 450] - quiet[row, 450]) * 80 / 255
    assert step_db == pytest.approx(6.02, abs=0.4)


def test_long_tracks_are_cut_and_the_page_says_so():
    track = Track("input", np.zeros(int((CLIP_S + 5) * 1000)), 1000, full_duration_s=4000.0)
    page = Page(render_report("t", [ReportEntry("x", [track])]))
    (data,) = page.sources("audio", "audio/flac")
    assert soundfile.info(io.BytesIO(data)).duration == CLIP_S
    assert any("the first 30 s of 1:06:40" in text for text in page.texts)


def test_many_channels_play_as_their_mean():
    x = np.stack([sine(440) * level for level in (0.1, 0.2, 0.6)])
    page = Page(render_report("t", [ReportEntry("x", [Track("microphones", x, 16000)])]))
    heard, _ = soundfile.read(io.BytesIO(page.sources("audio", "audio/flac")[0]))
    np.testing.assert_allclose(heard, x.mean(axis=0), atol=1e-4)
    assert any("3 channels" in text and "mean of all channels" in text for text in page.texts)


def test_three_tracks_and_rates_beyond_flac():
    tracks = [Track(name, sine(50, 384_000, 0.01), 384_000) for name in ("mixture", "talker 1", "talker 2")]
    page = Page(render_report("t", [ReportEntry("x", tracks)]))
    assert [soundfile.info(io.BytesIO(d)).samplerate for d in page.sources("audio", "audio/wav")] == [384_000] * 3


def test_page_appears_whole_and_is_known_again(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, "t", [entry()])
    assert is_report(path) and [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "other.html").write_text("<html><title>allears report</title></html>")
    assert not is_report(tmp_path / "other.html")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="samples"):
        write_report(path, "t", [ReportEntry("x", [Track("a", np.zeros(0), 16000)])])
    assert path.read_bytes() == before


@pytest.mark.parametrize(("seconds", "text"), [(3.25, "3.2 s"), (61.0, "1:01"), (3725.4, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text
