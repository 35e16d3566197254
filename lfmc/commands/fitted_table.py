"""Tables that stay readable on a narrow terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

WIDE = 100  # columns; rich's own layout is good from this width on
UNLIMITED = 10_000  # columns; wider than every cell
GAP = 2  # columns between two cells of a table without a frame


@dataclass(frozen=True)
class FittedTable:
    """A table that gives up its frame, and then whole columns, before it would cut a word.

    `spare` are the headers of the columns that it leaves out, in this order. A line below the table
    names those that are left out.
    """

    table: Table
    spare: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= WIDE:
            yield self.table
            return
        columns = [_Cells.of(column, console, options) for column in self.table.columns]
        omitted = list[str]()
        if sum(column.longest for column in columns) + 3 * len(columns) + 1 <= options.max_width:
            yield self.table
            return
        for header in self.spare:
            if _least_width(columns) <= options.max_width:
                break
            columns = [cells for cells in columns if cells.column.header != header]
            omitted.append(header.replace("\n", " "))
        yield _without_frame(self.table, columns, options.max_width)
        if omitted:
            yield f"not shown at this width: {', '.join(omitted)}"


@dataclass(frozen=True)
class _Cells:
    """A column, and the widths of its longest word and of its longest line."""

    column: Column
    word: int
    longest: int

    @classmethod
    def of(cls, column: Column, console: Console, options: ConsoleOptions) -> _Cells:
        cells: list[RenderableType] = [column.header, *column.cells]
        unlimited = options.update(width=UNLIMITED)
        sizes = [Measurement.get(console, unlimited, cell) for cell in cells]
        return cls(column, max(s.minimum for s in sizes), max(s.maximum for s in sizes))


def _least_width(columns: Sequence[_Cells]) -> int:
    """Return the width of a table without a frame whose words are whole."""
    return sum(cells.word for cells in columns) + GAP * (len(columns) - 1)


def _without_frame(table: Table, columns: Sequence[_Cells], width: int) -> Table:
    """Return a table of the columns, without lines between them, of at most `width`.

    The columns get the width of their longest word, and share what is left.
    """
    free = max(0, width - _least_width(columns))
    demand = sum(cells.longest - cells.word for cells in columns)
    result = Table(
        title=table.title,
        title_justify=table.title_justify,
        caption=table.caption,
        caption_justify=table.caption_justify,
        caption_style=table.caption_style,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for cells in columns:
        share = (cells.longest - cells.word) / demand * free if demand else 0
        result.add_column(
            cells.column.header,
            justify=cells.column.justify,
            width=min(cells.longest, cells.word + int(share)),
        )
    for row in zip(*(cells.column.cells for cells in columns), strict=True):
        result.add_row(*row)
    return result
