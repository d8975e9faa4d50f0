import debs
import numpy as np
import pytest

from allears.cli.main import main
from allears.core.errors import CorpusError
from allears.data import voices
from allears.data.corpus import read_manifest
from allears.data.packages import Package, Rule
from allears.data.voices import format_voices, group_voices, known_voices, parse_voices, prepare_voices, scene_of

PERSON = np.random.default_rng(0).standard_normal((4, 64))


def clips_of(rows, seed=1):
    """Embeddings of (person, scene, seconds) rows, as alike as clips of one voice are; every two are a line."""
    rng = np.random.default_rng(seed)
    x = PERSON[[person for person, _, _ in rows]] + 0.5 * rng.standard_normal((len(rows), 64))
    seconds = np.array([seconds for _, _, seconds in rows])
    lines = [f"{scene}-{index // 2}" for index, (_, scene, _) in enumerate(rows)]
    return x / np.linalg.norm(x, axis=1, keepdims=True), seconds, lines, [scene for _, scene, _ in rows]


def test_scenes_of_one_person_become_one_voice():
    pytest.importorskip("scipy")
    rows = [(0, "hero", 4.0)] * 24 + [(1, "01", 2.0)] * 20 + [(1, "02", 2.0)] * 20 + [(2, "03", 3.0)] * 12
    clear = [(2, None, 2.0)] * 4
    others = [(1, "03", 2.0)] * 2 + [(3, "04", 2.0)] * 6 + [(3, None, 2.0)] * 2
    found = group_voices(*clips_of(rows + clear + others))
    wanted = [0] * 24 + [1] * 40 + [2] * 16  # by the time they are heard
    assert found[: len(wanted)].tolist() == wanted
    # A line that is nearer to another voice than to its scene's, and a person who is heard too little.
    assert found[len(wanted) :].tolist() == [-1] * 10


def test_a_line_between_two_voices_has_none():
    pytest.importorskip("scipy")
    rows = [(0, "hero", 4.0)] * 10 + [(1, "01", 4.0)] * 10
    x, seconds, lines, scenes = clips_of(rows)
    between = x[:10].sum(0) / np.linalg.norm(x[:10].sum(0)) + x[10:].sum(0) / np.linalg.norm(x[10:].sum(0))
    x = np.concatenate([x, between[None] / np.linalg.norm(between)])
    found = group_voices(x, np.append(seconds, 3.0), [*lines, "a"], [*scenes, None])
    assert found.tolist()[-1] == -1 and sorted(set(found.tolist())) == [-1, 0, 1]
    # One voice for all where the distance allows it.
    assert set(group_voices(x[:20], seconds, lines, scenes, distance=1.9).tolist()) == {0}
    with pytest.raises(ValueError, match="scenes: none has 10 s"):
        group_voices(x[:4], seconds[:4], lines[:4], [None] * 4)
    with pytest.raises(ValueError, match="no voice has 30 s"):
        group_voices(x[:4], seconds[:4], lines[:4], scenes[:4])


def test_names_tell_scenes():
    names = ("JOE00262", "0312B4J1", "09XXXXP1", "03SSSSJ2", "C103E022", "MIK_0039", "JOEL", "48031EP2")
    assert [scene_of(name) for name in names] == ["hero", "hero", "09", "hero", None, None, None, "48"]


def test_shipped_grouping():
    shipped = known_voices()
    assert len(shipped) == 5194 and sorted(set(shipped.values())) == [f"amazon-queen-{n:02d}" for n in range(21)]
    scenes = {name: scene_of(name) for name in shipped}
    assert {shipped[name] for name, scene in scenes.items() if scene == "hero"} == {"amazon-queen-00"}
    assert "hero" not in {scene for name, scene in scenes.items() if shipped[name] != "amazon-queen-00"}
    assert parse_voices("# note\n" + format_voices(shipped)) == dict(shipped)


@pytest.fixture
def game(tmp_path, monkeypatch):
    """A package with two persons: a high and a low tone; 11 kHz."""
    files = {}
    for number in range(14):
        for name, hz in ((f"03{number:04X}J1", 300.0), (f"03{number:04X}P1", 1500.0)):
            files[f"{name}.SB"] = debs.wav_bytes(debs.tone(3.0, hz + number, 11_025), 11_025)
    files["C10A_011.SB"] = debs.wav_bytes(debs.tone(0.8, 300.0, 11_025), 11_025)
    files["1000SSSS.SB"] = debs.wav_bytes(debs.tone(2.0, 700.0, 11_025), 11_025)
    deb = debs.make_deb(tmp_path / "debs", "queens", {"usr/share/x/queen.1c": debs.make_queen(files)})
    rules = (Rule(r"SSSS\.SB$", "skip"), Rule(r"queen\.1c!.*\.SB$", "speech", speaker="queen", language="en"))
    table = {"queens": Package("queens", "1.0-1", debs.sha256(deb), "CC0", "train", rules)}
    monkeypatch.setattr(voices, "voice_packages", lambda: table)
    return tmp_path


def pitch_embedding(audio, rate):
    peak = np.abs(np.fft.rfft(audio)).argmax() * rate / len(audio)
    return np.eye(4)[int(peak > 1000)]


def test_voices_are_built_from_the_shipped_grouping_or_anew(game, monkeypatch, capsys):
    monkeypatch.setattr(voices, "known_voices", lambda: {"030000J1": "queen-00", "030001P1": "queen-01", "gone": "x"})
    assert main(["data", "voices", str(game / "c"), "--packages", str(game / "debs")]) == 0
    assert "queen-01" in capsys.readouterr().out
    items = read_manifest(game / "c")
    assert {(voices.clip_name(item), item.speaker) for item in items} == {
        ("030000J1", "queen-00"), ("030001P1", "queen-01"),
    }  # fmt: skip
    assert all((item.kind, item.split, item.narrow_band) == ("speech", "train", True) for item in items)
    pytest.importorskip("scipy")
    monkeypatch.setattr(voices, "speaker_embedding", pitch_embedding)
    items = prepare_voices(game / "c", game / "debs", regroup=True)
    assert len(items) == 28 and read_manifest(game / "c") == items
    heroes = {item.speaker for item in items if "J1" in item.source_path}
    others = {item.speaker for item in items if "P1" in item.source_path}
    assert len(heroes) == len(others) == 1 and heroes | others == {"queen-00", "queen-01"}
    assert len(parse_voices((game / "c/voices.tsv").read_text())) == 28


def test_another_corpus_is_not_replaced(small_corpus):
    before = (small_corpus / "manifest.jsonl").read_bytes()
    with pytest.raises(CorpusError, match="holds another corpus"):
        prepare_voices(small_corpus)
    assert (small_corpus / "manifest.jsonl").read_bytes() == before
