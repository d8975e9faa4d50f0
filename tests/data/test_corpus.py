from dataclasses import replace

import pytest

from allears.core.errors import CorpusError
from allears.data.corpus import Item, check_splits, item_to_dict, read_manifest, write_manifest

ITEM = Item(
    id="p:a", kind="speech", split="train", path="speech/p/a.flac", sample_rate_hz=16_000, frames=8000, package="p",
    version="1", package_sha256="00", source_path="usr/a.wav", licence="CC0-1.0", speaker="anna", text="Žluťoučký kůň",
    bandwidth_hz=7000.0, audio_sha256="aa",
)  # fmt: skip


def test_manifest_round_trip(tmp_path):
    items = [
        ITEM,
        replace(ITEM, id="p:b", kind="noise", speaker=None, text=None, narrow_band=True, noise_floor_db=-60.5),
    ]
    write_manifest(tmp_path, items)
    assert read_manifest(tmp_path) == items
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
    assert "speaker" not in item_to_dict(items[1])
    assert ITEM.seconds == 0.5 and replace(ITEM, sample_rate_hz=0).seconds == 0.0


def test_bad_manifest_says_where(tmp_path):
    with pytest.raises(CorpusError, match="allears data prepare"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, [ITEM])
    path = tmp_path / "manifest.jsonl"
    good = path.read_text()
    path.write_text(good + "{half")
    with pytest.raises(CorpusError, match="line 2"):
        read_manifest(tmp_path)
    path.write_text(good + good.replace('"licence"', '"license"'))
    with pytest.raises(CorpusError, match=r"item 2.*license"):
        read_manifest(tmp_path)
    path.write_text(good.replace('"speech"', '"song"'))
    with pytest.raises(CorpusError, match="kind 'song'"):
        read_manifest(tmp_path)


def test_leaks_between_splits_are_found():
    other = replace(ITEM, id="p:b", split="test", source_path="usr/b.wav", audio_sha256="bb", speaker="bea")
    assert check_splits([ITEM, other]) == []
    assert check_splits([ITEM, replace(other, speaker="anna")]) == ["speaker 'anna' is in test and train"]
    assert "audio_sha256" in check_splits([ITEM, replace(other, audio_sha256="aa")])[0]
    assert "source" in check_splits([ITEM, replace(other, source_path="usr/a.wav")])[0]
