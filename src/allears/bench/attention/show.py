"""A run as a terminal shows it: what is at work, then tables and notes, and the figure beside them."""

import logging
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from allears.bench.attention import figure
from allears.bench.attention.run import Report, measure
from allears.bench.attention.settings import Settings
from allears.bench.attention.table import tables
from allears.bench.results import machine
from allears.core.errors import MissingDependencyError

logger = logging.getLogger(__name__)


def run_and_show(
    settings: Settings,
    figure_path: Path,
    measure: Callable[..., Report] = measure,
    draw: Callable[..., Path] = figure.draw,
) -> Report:
    """Measure, draw ``figure_path`` where matplotlib is installed, and print what came out.

    Args:
        measure, draw: another benchmark's, with the same arguments.

    Raises:
        ValueError: a setting is wrong.
    """
    console = Console()
    with console.status("loading the systems") as status:
        report = measure(settings, on_case=status.update)
    for table in tables(report.rows):
        console.print(table)
    for note in report.notes:
        console.print(f"[dim]{escape(note)}[/dim]", highlight=False, soft_wrap=True)
    try:
        draw(report.rows, figure_path, subtitle=machine())
        console.print(f"written: {figure_path}")
    except (MissingDependencyError, ValueError) as error:
        logger.warning("no figure: %s", error)
    return report
