"""Panels of the report page: read back from the page, and compared with what was to be drawn."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from tests.audio.test_report import decode_png

from allears.audio.report import ReportEntry, Track, render_report
from allears.audio.report_axes import Strip
from allears.audio.report_panels import Curve, Panel, Picture, show_panels


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def points(path: str) -> list[list[tuple[float, float]]]:
    """The lines of a path, each a list of points."""
    return [[tuple(map(float, p.split())) for p in re.split(" L|h1", line) if p] for line in path.split("M")[1:]]


def test_a_curve_lies_where_its_values_are():
    curve = Curve("level", np.array([0.0, 2.5, 5.0, 7.5, 10.0]), np.array([0.0, 10.0, np.nan, 40.0, 20.0]))
    tags = Tags(show_panels([Panel("Level", unit="dB", low=0.0, high=40.0, curves=[curve])], 10.0))
    (path,) = tags.all("path")
    assert points(path["d"]) == [[(0, 100), (250, 75)], [(750, 0), (1000, 50)]]
    heights = [text for text in tags.texts if "s" not in text and text != "Level"]
    assert heights == ["0", "10", "20", "30", "40 dB"]


def test_what_lies_outside_is_cut_and_a_single_point_is_seen():
    curve = Curve("level", np.array([1.0, 2.0, 3.0, 12.0]), np.array([np.nan, 99.0, np.nan, 0.0]))
    (path,) = Tags(show_panels([Panel("Level", low=-10.0, high=10.0, curves=[curve])], 10.0)).all("path")
    assert path["d"] == "M200.0 0.0h1"


def test_labels_are_round_whatever_the_range():
    texts = Tags(show_panels([Panel("x", unit="dB", low=-10.0, high=40.0)], 1.0)).texts
    assert [text for text in texts if not text.endswith(" s")] == ["x", "0", "20", "40 dB"]


def test_a_picture_covers_its_share_of_the_time():
    values = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    panel = Panel("Delay", low=0.0, high=20.0, picture=Picture(values, 6.0, 0.0, 1.0))
    (image,) = Tags(show_panels([panel], 8.0)).all("img")
    assert image["style"] == "width: 75.000%" and image["alt"] == "Delay over time"
    pixels, _ = decode_png(base64.b64decode(image["src"].partition(",")[2]))
    np.testing.assert_array_equal(pixels, np.round(255 * values[::-1]))


def test_rows_of_spans():
    rows = [Strip("one", [(1.0, 3.0), (9.0, 12.0)]), Strip("two", [(11.0, 12.0)])]
    tags = Tags(show_panels([Panel("Activity", rows=rows)], 10.0))
    marks = [(float(r["x"]), float(r["width"]), float(r["y"]) < 50) for r in tags.all("rect")]
    assert marks == [(100.0, 200.0, True), (900.0, 100.0, True)]
    assert [group["aria-label"] for group in tags.all("g")] == ["one", "two"]


def test_names_of_several_curves_are_told_and_escaped():
    x = np.array([0.0, 1.0])
    curves = [Curve("a<b", x, x), Curve("c", x, x, faint=True)]
    page = show_panels([Panel("P", "note & more", curves=curves)], 1.0)
    tags = Tags(page)
    assert "a&lt;b" in page and "note &amp; more" in page
    assert [path.get("class") for path in tags.all("path")] == ["faint", None]  # drawn first, so that it lies behind
    assert show_panels([Panel("P")], 0.0) == ""


@pytest.mark.parametrize(("length_s", "shown"), [(4.0, 0), (100.0, 1)])
def test_a_card_with_panels_has_one_column_and_an_overview_of_what_is_longer(length_s, shown):
    tracks = [Track("a", 0.1 * np.ones(4000), 1000, length_s), Track("b", 0.1 * np.ones(4000), 1000, length_s)]
    one, whole = Panel("of the clip"), Panel("of all")
    entry = ReportEntry("x", tracks, duration_s=length_s, panels=[one], overview=[whole])
    page = render_report("X", [entry])
    assert page.count('class="stacked"') == 1 + shown and 'class="tracks"' not in page
    assert page.count("of the clip") == 1 and page.count("of all") == shown
    assert page.count(">4 s<") == 3 and page.count(">100 s<") == shown
    assert 'class="tracks"' in render_report("X", [ReportEntry("x", tracks)])
