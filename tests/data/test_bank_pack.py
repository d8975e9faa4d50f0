import logging

import numpy as np
import pytest
import soundfile as sf

from allears.core.errors import CorpusError
from allears.data.bank import AudioBank, load_bank, pack_folders
from allears.data.corpus import Item, write_manifest
from allears.data.pack import choose_evenly, opus_compression_level, pack
from allears.data.verify import verify


def voice(frames: int, seed: int) -> np.ndarray:
    """Something with pitch and pauses, int16."""
    rng = np.random.default_rng(seed)
    t = np.arange(frames) / 16_000
    pitch = 120 + 40 * np.sin(2 * np.pi * 1.3 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    wave = sum(np.sin(k * phase) / k for k in range(1, 20)) * (0.4 + 0.4 * np.sin(2 * np.pi * 3 * t + seed))
    return np.round(3000 * wave + 20 * rng.standard_normal(frames)).astype(np.int16)


def make_corpus(folder, seconds=(1.0, 0.7, 1.3, 2.0, 0.5)):
    items, audio = [], []
    for i, (length, kind, split) in enumerate(
        zip(
            seconds,
            ("speech", "speech", "noise", "speech", "event"),
            ("train", "val", "train", "train", "test"),
            strict=True,
        )
    ):
        samples = voice(round(length * 16_000) + 7 * i, i)
        path = f"{kind}/p/{i}.flac"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        sf.write(folder / path, samples, 16_000)
        speaker = f"s{i}" if kind == "speech" else None
        items.append(
            Item(
                f"p:{i}",
                kind,
                split,
                path,
                16_000,
                len(samples),
                "p",
                "1",
                "00",
                f"usr/{i}",
                "CC0-1.0",
                speaker=speaker,
                text="ž",
            )
        )
        audio.append(samples)
    write_manifest(folder, items)
    return items, audio


def test_bank_holds_the_samples_of_the_corpus(tmp_path):
    items, audio = make_corpus(tmp_path)
    bank = AudioBank.from_corpus(tmp_path)
    assert bank.items == items and bank.audio.dtype == np.int16 and bank.starts.dtype == bank.lengths.dtype == np.int64
    for i, samples in enumerate(audio):
        assert np.array_equal(bank.audio[bank.starts[i] : bank.starts[i] + bank.lengths[i]], samples)
        assert np.array_equal(bank.crop(i), samples.astype(np.float32) / 32768)
    assert bank.seconds == sum(map(len, audio)) / 16_000
    assert bank.speakers() == {"s0": [0], "s1": [1], "s3": [3]}
    assert bank.index_of("p:3") == 3
    with pytest.raises(CorpusError, match="'p:9'"):
        bank.index_of("p:9")


def test_a_bank_without_items_is_told(tmp_path, caplog):
    make_corpus(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(load_bank([str(tmp_path)], ("speech",), ("train",))) and not caplog.records
        assert not len(load_bank([str(tmp_path)], ("babble",), ("val",)))
    assert "no item of kind babble in split val" in caplog.text


def test_crop_is_zero_outside_the_item(tmp_path):
    _, audio = make_corpus(tmp_path)
    bank = AudioBank.from_corpus(tmp_path)
    wanted = audio[1].astype(np.float32) / 32768
    have = len(wanted)
    for offset, length in (
        (0, 50),
        (100, 50),
        (-30, 50),
        (have - 20, 50),
        (have + 5, 50),
        (-100, 50),
        (-5, have + 10),
        (3, 0),
    ):
        inside = np.zeros(length, np.float32)
        for n in range(max(0, -offset), min(length, have - offset)):
            inside[n] = wanted[offset + n]
        assert np.array_equal(bank.crop(1, offset, length), inside)
    assert np.array_equal(bank.crop(1, 10), wanted[10:])


def test_selections(tmp_path):
    _, audio = make_corpus(tmp_path)
    bank = AudioBank.from_corpus(tmp_path)
    train = bank.select(lambda item: item.split == "train")
    assert train.audio is bank.audio and [item.id for item in train.items] == ["p:0", "p:2", "p:3"]
    assert np.array_equal(train.crop(train.index_of("p:3")), audio[3] / np.float32(32768))
    assert len(bank.select(lambda item: False)) == 0
    assert [i.id for i in AudioBank.from_corpus(tmp_path, kinds=["speech"], splits=["train"]).items] == ["p:0", "p:3"]
    assert [i.id for i in AudioBank.from_corpus(tmp_path, ids=["p:4", "p:1"]).items] == ["p:1", "p:4"]
    with pytest.raises(CorpusError, match="'p:7'"):
        AudioBank.from_corpus(tmp_path, ids=["p:7", "p:1"])


def test_files_that_are_not_as_the_manifest_says(tmp_path):
    items, audio = make_corpus(tmp_path)
    sf.write(tmp_path / items[0].path, audio[0][:-1], 16_000)
    with pytest.raises(CorpusError, match=r"0\.flac: 15999 samples, wanted 16000"):
        AudioBank.from_corpus(tmp_path)
    sf.write(tmp_path / items[0].path, audio[0], 8_000)
    with pytest.raises(CorpusError, match="8000 Hz"):
        AudioBank.from_corpus(tmp_path)
    (tmp_path / items[0].path).unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        AudioBank.from_corpus(tmp_path)


def test_flac_pack_is_exact(tmp_path):
    _, audio = make_corpus(tmp_path / "c")
    folders = pack(tmp_path / "c", tmp_path / "p", splits=("train", "val", "test"), codec="flac")
    assert folders == [tmp_path / "p"] and verify(tmp_path / "p") == []
    bank = AudioBank.from_pack(tmp_path / "p")
    assert sorted(item.id for item in bank.items) == [f"p:{i}" for i in range(5)]
    for index, item in enumerate(bank.items):
        assert np.array_equal(bank.crop(index), audio[int(item.id[2:])] / np.float32(32768))
        assert item.text == "ž"
    assert [i.id for i in AudioBank.from_pack(tmp_path / "p", kinds=["speech"], splits=["val"]).items] == ["p:1"]


def test_opus_pack_is_aligned(tmp_path):
    _, audio = make_corpus(tmp_path / "c")
    pack(tmp_path / "c", tmp_path / "p", splits=("train", "val", "test"), kbps={"speech": 48})
    bank = AudioBank.from_pack([tmp_path / "p"])
    for index, item in enumerate(bank.items):
        original, coded = audio[int(item.id[2:])] / 32768, bank.crop(index)
        size = 2 * len(original)
        correlation = np.fft.irfft(np.fft.rfft(coded, size) * np.conj(np.fft.rfft(original, size)))
        assert np.argmax(correlation) == 0, "delayed"
        assert 10 * np.log10((original**2).sum() / ((original - coded) ** 2).sum()) > 15


def test_opus_rate_is_the_one_asked_for(tmp_path):
    make_corpus(tmp_path / "c", (20.0, 1.0, 1.0, 20.0, 1.0))
    for kbps in (24.0, 48.0):
        pack(tmp_path / "c", tmp_path / f"p{kbps}", kinds=["speech"], splits=["train"], kbps=kbps)
        (shard,) = (tmp_path / f"p{kbps}").glob("*.opus")
        assert shard.stat().st_size * 8 / 40.0 / 1000 == pytest.approx(kbps, rel=0.25)
    assert opus_compression_level(256) == 0.0 and opus_compression_level(6) == 1.0
    with pytest.raises(ValueError, match="kbps=300"):
        opus_compression_level(300)


def test_shards_and_folders_keep_their_sizes(tmp_path):
    _, audio = make_corpus(tmp_path / "c", (4.0, 4.0, 4.0, 4.0, 4.0))
    limits = {"max_shard_mib": 0.2, "max_folder_mib": 0.3}
    folders = pack(tmp_path / "c", tmp_path / "p", splits=("train", "val", "test"), codec="flac", **limits)
    assert len(folders) > 1 and pack_folders(tmp_path / "p") == folders == [
        tmp_path / "p" / name for name in "abcde"[: len(folders)]
    ]
    for folder in folders:
        sizes = [path.stat().st_size for path in folder.iterdir()]
        assert max(sizes) <= 0.2 * 2**20 and sum(sizes) <= 0.3 * 2**20
    assert len(AudioBank.from_pack(folders[0])) < 5
    bank = AudioBank.from_pack(tmp_path / "p")
    assert bank.items[0].id == "p:0" and len(bank) == 5
    assert np.array_equal(bank.crop(bank.index_of("p:4")), audio[4] / np.float32(32768))


def test_pack_refusals(tmp_path, caplog):
    make_corpus(tmp_path / "c")
    with pytest.raises(CorpusError, match="no item of kinds music"):
        pack(tmp_path / "c", tmp_path / "p", kinds=["music"])
    with pytest.raises(CorpusError, match="codec='mp3'"):
        pack(tmp_path / "c", tmp_path / "p", codec="mp3")
    with pytest.raises(CorpusError, match="no pack there"):
        AudioBank.from_pack(tmp_path)
    with caplog.at_level(logging.WARNING):
        pack(tmp_path / "c", tmp_path / "p", max_shard_mib=0.0001)
    assert "more than the" in caplog.text
    with pytest.raises(CorpusError, match="holds a pack already"):
        pack(tmp_path / "c", tmp_path / "p")
    (shard,) = (tmp_path / "p").glob("speech-val*")
    shard.unlink()
    assert len(verify(tmp_path / "p")) == 1
    with pytest.raises(CorpusError, match="speech-val"):
        AudioBank.from_pack(tmp_path / "p")


def test_choose_evenly(tmp_path):
    items = [
        Item(f"p:{i}", "music", "train", "x", 16_000, 160_000, "p", "1", "0", f"{i}", "l") for i in range(100)
    ]  # 10 s each
    chosen = choose_evenly(items, 5.0)
    assert len(chosen) == 30 and chosen == [item for item in items if item in chosen]
    assert 3 <= sum(item in chosen for item in items[:33]) <= 20, "not all from one end"
    assert choose_evenly(items, 1e9) == items
