"""Tables on narrow terminals."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lfmc.commands.fitted_table import FittedTable

WORDS = "every operator of the artifact alone, as shipped"


def render(width: int, *spare: str) -> list[str]:
    table = Table("rung", "comparison", "worst\ncase", "difference", title="parity")
    table.add_row("3", WORDS, "MatMulNBits 4 bit", "7.7e-07")
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(FittedTable(table, spare))
    return capture.get().splitlines()


def test_a_wide_terminal_shows_the_frame() -> None:
    assert any(line.startswith("┏") for line in render(100, "worst\ncase"))


def test_a_narrow_terminal_shows_whole_words_in_every_line() -> None:
    for width in range(40, 100):
        lines = render(width, "worst\ncase")
        assert not any("…" in line for line in lines), width
        assert all(len(line) <= width for line in lines), width
        text = " ".join(lines)
        assert "7.7e-07" in text
        assert all(word in text for word in WORDS.split()), width


def test_columns_are_left_out_only_if_needed_and_are_named() -> None:
    assert "MatMulNBits" in " ".join(render(60, "worst\ncase"))
    narrow = render(40, "worst\ncase", "rung")
    assert "MatMulNBits" not in " ".join(narrow)
    assert narrow[-1] == "not shown at this width: worst case"
