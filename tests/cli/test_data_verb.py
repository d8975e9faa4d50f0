import numpy as np
import pytest
import soundfile as sf

from allears.cli.main import main
from allears.data.corpus import Item, write_manifest


@pytest.fixture
def corpus(tmp_path):
    folder, items = tmp_path / "c", []
    for i, (kind, split) in enumerate([("speech", "train"), ("speech", "test"), ("noise", "val")]):
        samples = np.random.default_rng(i).integers(-5000, 5000, 16_000 * 36, dtype=np.int16)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        sf.write(folder / f"{kind}/{i}.flac", samples, 16_000)
        import hashlib

        digest = hashlib.sha256(samples.tobytes()).hexdigest()
        speaker = f"voice{i}" if kind == "speech" else None
        items.append(
            Item(f"p:{i}", kind, split, f"{kind}/{i}.flac", 16_000, len(samples), "p", "1", "0", f"{i}", "CC0-1.0",
                 speaker=speaker, audio_sha256=digest)
        )  # fmt: skip
    write_manifest(folder, items)
    return folder


def test_list_counts_hours(corpus, capsys):
    assert main(["data", "list", str(corpus)]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["speech", "train", "1", "0.010"] in rows and ["all", "3", "0.030"] in rows
    assert main(["data", "list", str(corpus), "--by", "speaker", "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert "voice1" in out and "voice0" not in out
    assert main(["data", "list", str(corpus), "--by", "mood"]) == 2
    assert "mood" in capsys.readouterr().err


def test_pack_then_verify(corpus, tmp_path, capsys):
    arguments = [
        "data",
        "pack",
        str(corpus),
        str(tmp_path / "p"),
        "--kinds",
        "speech",
        "noise",
        "--max-minutes",
        "noise",
        "0.1",
    ]
    assert main(arguments) == 0
    assert [path.name for path in sorted((tmp_path / "p").iterdir())] == ["index.jsonl", "speech-train-00.opus"]
    assert main(["data", "verify", str(tmp_path / "p")]) == 0 == main(["data", "verify", str(corpus)])
    (corpus / "noise/2.flac").unlink()
    capsys.readouterr()
    assert main(["data", "verify", str(corpus)]) == 1
    assert "2.flac: missing" in capsys.readouterr().out.replace("\n", "")


def test_sealed_package_is_one_clear_line(tmp_path, capsys):
    assert main(["data", "prepare", str(tmp_path / "c"), "--only", "unknown-horizons"]) == 2
    assert "sealed" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
