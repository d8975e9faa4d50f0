"""Naming files, folders and patterns."""

from pathlib import Path

import pytest

from allears.audio import listing
from allears.audio.files import list_audio_files
from allears.core.errors import AudioFileError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        "b.wav",
        "a.FLAC",
        "notes.txt",
        "sub/c.ogg",
        "sub/deep/d.mp3",
        ".hidden/e.wav",
        ".f.wav.part",
        "g.mp4",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "read.me").touch()
    monkeypatch.setattr(listing, "have_ffmpeg", lambda: False)
    return tmp_path


def found(tree, *paths):
    return [str(path.relative_to(tree)) for path in list_audio_files(paths)]


def test_a_folder_gives_its_sound_files_sorted(tree, caplog):
    assert found(tree, tree) == ["a.FLAC", "b.wav", "sub/c.ogg", "sub/deep/d.mp3"]
    assert "1 media files passed over" in caplog.text


def test_media_files_count_where_ffmpeg_reads_them(tree, monkeypatch):
    monkeypatch.setattr(listing, "have_ffmpeg", lambda: True)
    assert found(tree, tree) == ["a.FLAC", "b.wav", "g.mp4", "sub/c.ogg", "sub/deep/d.mp3"]


def test_files_keep_their_order_and_come_once(tree):
    assert found(tree, tree / "b.wav", tree, str(tree / "b.wav")) == ["b.wav", "a.FLAC", "sub/c.ogg", "sub/deep/d.mp3"]
    assert found(tree, tree / "notes.txt") == ["notes.txt"]  # named: reading it will tell what is wrong


def test_patterns(tree):
    assert found(tree, f"{tree}/*.wav") == ["b.wav"]
    assert found(tree, f"{tree}/**/*.mp3") == ["sub/deep/d.mp3"]
    assert found(tree, f"{tree}/s*") == ["sub/c.ogg", "sub/deep/d.mp3"]


def test_a_file_with_pattern_characters_in_its_name(tree):
    (tree / "take[1].wav").touch()
    assert found(tree, tree / "take[1].wav") == ["take[1].wav"]


def test_what_is_not_there_is_told(tree):
    with pytest.raises(AudioFileError, match="no sound file in this folder"):
        list_audio_files([tree / "none"])
    with pytest.raises(AudioFileError, match="there is no such file or folder"):
        list_audio_files([tree / "b.wav", tree / "x.wav"])
    with pytest.raises(AudioFileError, match="no sound file matches"):
        list_audio_files([f"{tree}/*.txt"])
    with pytest.raises(ValueError, match=r"^paths: got the single path"):
        list_audio_files(str(tree))
    with pytest.raises(ValueError, match=r"^paths:"):
        list_audio_files(Path(tree))
