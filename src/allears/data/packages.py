"""The table of packages that the corpus is built from (``packages.toml``), and which members of them become what."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from allears.core.errors import CorpusError
from allears.data.archives import refuse_sealed
from allears.data.corpus import SPLITS

Made = TypeVar("Made")
RULE_KINDS = ("speech", "babble", "music", "rir", "hrtf", "sound", "skip")


@dataclass(frozen=True)
class Rule:
    """What to do with the members whose path ``match`` (a regular expression) is found in.

    ``speaker`` and ``language`` may use the named groups of ``match``, as in ``"tuxpaint-{lang}"``.
    """

    match: str
    kind: str
    split: str | None = None
    speaker: str | None = None
    language: str | None = None
    label: str | None = None
    force: str | None = None
    excerpt_s: float | None = None
    every: int = 1
    max_minutes: float | None = None
    sample_rate_hz: int = 0
    frames: int = 0

    def __post_init__(self) -> None:
        if self.kind not in RULE_KINDS:
            raise CorpusError(f"rule {self.match!r}: kind {self.kind!r} is not one of {', '.join(RULE_KINDS)}")
        if self.split is not None and self.split not in SPLITS:
            raise CorpusError(f"rule {self.match!r}: split {self.split!r} is not one of {', '.join(SPLITS)}")
        if self.every < 1:
            raise CorpusError(f"rule {self.match!r}: every={self.every}; wanted 1 or more")


@dataclass(frozen=True)
class Package:
    """A package: pinned version and checksum (a prefix is enough), licence, split, and the rules for its members.

    ``copies`` is found in the paths of members that are known to be in another split too, under another coding.
    """

    name: str
    version: str
    sha256: str
    licence: str
    split: str
    rules: tuple[Rule, ...] = ()
    texts: str | None = None
    texts_from: str | None = None
    copies: str | None = None

    def __post_init__(self) -> None:
        refuse_sealed(self.name)
        if self.split not in SPLITS:
            raise CorpusError(f"package {self.name!r}: split {self.split!r} is not one of {', '.join(SPLITS)}")

    def find_rule(self, path: str) -> tuple[int, Rule, dict[str, str]] | None:
        """Index, rule and named groups of the first rule that fits ``path``; ``None`` if the member is left out."""
        for index, rule in enumerate(self.rules):
            if found := re.search(rule.match, path):
                return None if rule.kind == "skip" else (index, rule, found.groupdict())
        return None


def parse_table(text: str, make: Callable[[dict[str, Any]], Made], what: str) -> list[Made]:
    """What ``make`` makes of each row ``[[package]]`` of a table in TOML.

    Raises:
        CorpusError: the table is not TOML, or a row has an unknown or a missing key; ``what`` names the table in it.
    """
    try:
        return [make(row) for row in tomllib.loads(text).get("package", [])]
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise CorpusError(f"{what}: {error}") from error


def parse_packages(text: str) -> dict[str, Package]:
    """A table in TOML as packages by name.

    Raises:
        CorpusError: the table is not TOML, has an unknown key, or names a sealed package.
    """

    def make(row: dict[str, Any]) -> Package:
        return Package(**(row | {"rules": tuple(Rule(**rule) for rule in row.get("rules", []))}))

    return {package.name: package for package in parse_table(text, make, "package table")}


@cache
def known_packages() -> dict[str, Package]:
    """The table that ships with allears."""
    return parse_packages((files("allears.data") / "packages.toml").read_text(encoding="utf-8"))
