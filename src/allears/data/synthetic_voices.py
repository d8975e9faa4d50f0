"""The table of synthetic voices and of the packages that they come from (``synthetic_voices.toml``)."""

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from allears.core.errors import CorpusError
from allears.data.packages import Package
from allears.data.synthetic_texts import known_languages


@dataclass(frozen=True)
class SyntheticVoice:
    """One speaker. ``engine`` is the program that speaks it (see :mod:`allears.data.synthetic_engines`), ``voice`` what
    that program calls it, ``packages`` what must be unpacked besides the engine's own; its items name the first."""

    name: str
    engine: str
    voice: str
    language: str
    packages: tuple[str, ...] = ()
    encoding: str = "utf-8"
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.language not in known_languages():
            raise CorpusError(f"voice {self.name!r}: language {self.language!r} is not one of the known ones")


@dataclass(frozen=True)
class VoiceTable:
    """Voices and packages by name; packages without voices are programs and libraries."""

    voices: dict[str, SyntheticVoice]
    packages: dict[str, Package]

    def choose(self, only: Collection[str] | None) -> list[SyntheticVoice]:
        """The voices named, in the table's order; all if ``only`` is ``None``.

        Raises:
            CorpusError: one is not in the table.
        """
        if unknown := sorted(set(only or ()) - set(self.voices)):
            raise CorpusError(f"only={unknown[0]!r}: no such voice; known are {', '.join(sorted(self.voices))}")
        return [voice for name, voice in self.voices.items() if only is None or name in only]


def parse_voice_table(text: str) -> VoiceTable:
    """A table in TOML.

    Raises:
        CorpusError: it is not TOML, has an unknown or a missing key, or a voice names a package that is not in it.
    """
    try:
        rows: dict[str, Any] = tomllib.loads(text)
        packages = [Package(split="train", **row) for row in rows.get("package", [])]
        voices = [
            SyntheticVoice(**(row | {"packages": tuple(row.get("packages", ()))})) for row in rows.get("voice", [])
        ]
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise CorpusError(f"voice table: {error}") from error
    table = VoiceTable({voice.name: voice for voice in voices}, {package.name: package for package in packages})
    for voice in voices:
        if missing := [name for name in voice.packages if name not in table.packages]:
            raise CorpusError(f"voice {voice.name!r}: package {missing[0]!r} is not in the table")
    return table


@cache
def known_synthetic_voices() -> VoiceTable:
    """The table that ships with allears."""
    return parse_voice_table((files("allears.data") / "synthetic_voices.toml").read_text(encoding="utf-8"))
