"""Tokens on disk: a byte-level BPE tokenizer, two files of uint16, and what they were made of.

``train.bin.xz`` and ``val.bin.xz`` hold the documents one after another, little-endian uint16, each followed by the
token :data:`END`. Reading them needs numpy alone; making them needs ``tokenizers``.
"""

import hashlib
import json
import logging
import lzma
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.errors import CorpusError, require

log = logging.getLogger(__name__)

END = "<|end|>"
_BATCH = 256
_TOKENIZER_SAMPLE = 40_000_000


@dataclass(frozen=True)
class TokenReport:
    """What a folder of tokens holds.

    Args:
        vocabulary: entries of the tokenizer, at most 65,536.
        end: the token after each document.
        train_tokens, val_tokens: in all.
        train_documents, val_documents: in all.
        val_bytes: of UTF-8 text in the validation documents, for bits a byte.
        train_bytes: likewise.
        sha256: of the uint16 of both splits, by split.
        sources: a row a package: name, version, licence, documents, characters.
    """

    vocabulary: int
    end: int
    train_tokens: int
    val_tokens: int
    train_documents: int
    val_documents: int
    train_bytes: int
    val_bytes: int
    sha256: dict[str, str]
    sources: list[dict[str, Any]]


@dataclass(frozen=True)
class TokenData:
    """Tokens in memory: ``train`` and ``val``, uint16, one dimension, and their report."""

    train: np.ndarray
    val: np.ndarray
    report: TokenReport

    @property
    def val_bytes_per_token(self) -> float:
        return self.report.val_bytes / self.report.val_tokens


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE (Sennrich et al., 2016, on bytes) of ``vocabulary`` entries: any text has an encoding, and
    decoding gives it back.

    Raises:
        ValueError: ``vocabulary`` does not lie in 257 to 65,536.
        MissingDependencyError: ``tokenizers`` is not installed.
    """
    if not 257 <= vocabulary <= 2**16:
        raise ValueError(
            f"vocabulary: {vocabulary} given; 256 bytes and the end token must fit it, and it uint16: 257 to 65536"
        )
    tokenizers = require("tokenizers", "text", "training a tokenizer")
    require("tokenizers.trainers", "text", "training a tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text)
        if size >= _TOKENIZER_SAMPLE:
            break
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> tuple[np.ndarray, int, int]:
    """All ``texts`` as one row of uint16, each followed by :data:`END`; how many texts and UTF-8 bytes went in.

    After ``limit`` tokens no further text is begun.
    """
    end = tokenizer.token_to_id(END)
    rows: list[np.ndarray] = []
    total = count = size = 0
    for start in range(0, len(texts), _BATCH):
        if limit is not None and total >= limit:
            break
        batch = texts[start : start + _BATCH]
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(list(batch)), strict=True):
            if limit is not None and total >= limit:
                break
            rows.append(np.array([*encoding.ids, end], dtype=np.uint16))
            total, count, size = total + len(rows[-1]), count + 1, size + len(text.encode())
    return np.concatenate(rows) if rows else np.zeros(0, np.uint16), count, size


def write_tokens(
    folder: Path,
    train: Sequence[str],
    val: Sequence[str],
    sources: list[dict[str, Any]],
    vocabulary: int,
    max_train_tokens: int | None = None,
) -> TokenReport:
    """Train the tokenizer on ``train``, encode both, and write the folder; ``corpus.json``, which readers ask for,
    comes last.
    """
    tokenizer = train_tokenizer(train, vocabulary)
    train_ids, train_count, train_bytes = encode(tokenizer, train, max_train_tokens)
    val_ids, val_count, val_bytes = encode(tokenizer, val)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.json").unlink(missing_ok=True)  # from here on the older files are not whole
    tokenizer.save(str(folder / "tokenizer.json"))
    hashes = {name: _write(folder, name, ids) for name, ids in (("train", train_ids), ("val", val_ids))}
    end, size = tokenizer.token_to_id(END), tokenizer.get_vocab_size()
    report = TokenReport(
        size, end, len(train_ids), len(val_ids), train_count, val_count, train_bytes, val_bytes, hashes, sources
    )
    part = folder / "corpus.json.tmp"
    part.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / "corpus.json")
    log.info("%s: %d tokens to train on, %d to validate", folder, len(train_ids), len(val_ids))
    return report


def _write(folder: Path, name: str, ids: np.ndarray) -> str:
    data = ids.astype("<u2").tobytes()
    part = folder / f"{name}.bin.xz.tmp"
    part.write_bytes(lzma.compress(data, preset=4))
    os.replace(part, folder / f"{name}.bin.xz")
    return hashlib.sha256(data).hexdigest()


def read_tokens(folder: str | Path) -> TokenData:
    """The tokens of a folder that :func:`allears.data.text.build_text_corpus` made.

    Raises:
        CorpusError: the folder holds none, or a file is damaged or another one's.
    """
    folder = Path(folder)
    path = folder / "corpus.json"
    if not path.is_file():
        raise CorpusError(f"{folder}: holds no corpus.json; build it with allears.data.text.build_text_corpus")
    report = TokenReport(**json.loads(path.read_text(encoding="utf-8")))
    arrays = {}
    for name in ("train", "val"):
        part = folder / f"{name}.bin.xz"
        try:
            data = lzma.decompress(part.read_bytes())
        except (OSError, lzma.LZMAError) as error:
            raise CorpusError(f"{part}: cannot be read ({error}); build the corpus again") from error
        if hashlib.sha256(data).hexdigest() != report.sha256[name]:
            raise CorpusError(f"{part}: does not belong to {path} (another checksum); build the corpus again")
        arrays[name] = np.frombuffer(data, dtype="<u2").astype(np.uint16)
    return TokenData(arrays["train"], arrays["val"], report)
