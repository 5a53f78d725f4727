"""A table that is shown while its rows are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@contextmanager
def growing(title: str, caption: str, columns: Sequence[str]) -> Iterator[Table]:
    """A table to add rows to; what they are of is in the first column."""
    from rich import box
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file is as wide as the table; rich would cut numbers off at 80
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left", no_wrap=not k)
    with Live(table, console=console, refresh_per_second=2):
        yield table


def three_digits(x: float) -> str:
    """1130, 69.2, 2.69, 0.062: as many digits as a time is worth."""
    return f"{x:.0f}" if x >= 99.95 else f"{x:#.3g}"
