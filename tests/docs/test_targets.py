"""docs/targets.md and the pages of the targets match the targets' capabilities."""

from __future__ import annotations

import re

import pytest

from lfmc.calib_free.grid.formats import ROW, Format
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.targets.base import TARGETS, get_target
from tests.docs.blocks import REPO

UNITS = {"matrix": "each expert's matrix", "expert": "each expert"}


def rows() -> dict[str, list[str]]:
    text = (REPO / "docs" / "targets.md").read_text(encoding="utf-8")
    section = text.partition("\n## Capabilities\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", section, re.M)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in lines}


def numbers(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def scales(formats: tuple[Format, ...]) -> str:
    """Describe the columns per scale, with exceptions for some bit widths."""
    groups = numbers({f.group for f in formats if f.group > 0})
    rows = {f.bits for f in formats if f.group == ROW}
    tables = numbers({f.bits for f in formats if f.palette})
    if not groups:
        return "one row"
    text = groups + "".join(f"; {bits} bits: one row" for bits in sorted(rows))
    *head, last = tables.split(", ")
    return text + (f"; {', '.join(head)} and {last} bits: a table per row" if tables else "")


def test_every_target_has_a_row() -> None:
    assert set(rows()) == set(TARGETS)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_row_matches_the_capabilities_of_the_target(name: str) -> None:
    capabilities = get_target(name).capabilities(open_checkpoint().config)
    matrix_formats = (*capabilities.linear, *capabilities.embedding)
    formats = (*matrix_formats, *capabilities.expert)
    assert rows()[name] == [
        numbers({f.bits for f in matrix_formats}),
        numbers({f.bits for f in capabilities.expert}),
        scales(formats),
        "yes" if any(not f.symmetric for f in formats) else "no",
        UNITS[capabilities.expert_unit],
    ]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_has_a_page_with_its_options(name: str) -> None:
    page = (REPO / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for option in get_target(name).options:
        assert re.search(rf"`{option.name}`|-O {option.name}=", page), option.name
        missing = [choice for choice in option.choices if f"`{choice}`" not in page]
        ranges = {"accelerator"}  # its page describes the choices as a range
        assert option.name in ranges or not missing, (option.name, missing)


ASPECTS = {
    "capabilities": r"(Number|Weight) formats|Numbers",
    "states": r".*[Ss]tates",
    "what was executed": r"What is proven|Proof.*|Parity",
    "bad combinations": r"Known (bad combinations|trouble on devices)",
}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_page_has_the_four_sections(name: str) -> None:
    page = (REPO / "docs" / f"{name}.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", page, re.M)
    for aspect, pattern in ASPECTS.items():
        assert any(re.fullmatch(pattern, title) for title in titles), aspect
