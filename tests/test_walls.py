"""Imports of the code must agree with the table of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BESIDE = ("passes", "targets", "calib_free")  # folders that install inside of the package
TABLE_HEAD = "| room | what is in it | imports |"
# The public package imports its API when a name is first used, and the API imports everything.
LAZY = {("lfmc", "lfmc.api")}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for folder in ("lfmc", *BESIDE):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts if folder == "lfmc" else ["lfmc", *parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in its file and for types, too."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in modules():
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())


@cache
def module_arrows() -> dict[str, frozenset[str]]:
    return {
        module: frozenset(
            name for name in imports(module) if name != module and (module, name) not in LAZY
        )
        for module in modules()
    }


def room_of(module: str) -> str:
    """The folder of a module, without `lfmc.`; a module at the top is a room of its own."""
    is_package = modules()[module].name == "__init__.py"
    room = module if is_package or module.count(".") == 1 else module.rpartition(".")[0]
    return room.removeprefix("lfmc.")


@cache
def room_arrows() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {}
    for module, imported in module_arrows().items():
        room = room_of(module)
        arrows.setdefault(room, set()).update(map(room_of, imported))
        arrows[room].discard(room)
    return arrows


@cache
def table() -> dict[str, frozenset[str]]:
    """Return what each room may import, by the table; `a.*` covers the rooms in `a`."""
    lines = iter((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines())
    assert TABLE_HEAD in lines
    next(lines)
    rules = {}
    for line in lines:
        if not line.startswith("|"):
            break
        rooms, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        for room in rooms.split(","):
            rules[room.strip(" `")] = frozenset(name.strip(" `") for name in allowed.split(","))
    return rules


def is_allowed(room: str, allowed: frozenset[str]) -> bool:
    folders = (name.removesuffix("*") for name in allowed if name.endswith(".*"))
    return room in allowed or room.startswith(tuple(folders))


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(module_arrows()).prepare()  # raises CycleError, which names the circle


def test_no_rooms_import_each_other_in_a_circle() -> None:
    TopologicalSorter(room_arrows()).prepare()


def test_the_table_names_every_room_and_no_other() -> None:
    rooms = {room for room in room_arrows() if room not in ("lfmc", "__main__", "data", "demo")}
    assert set(table()) == rooms


@pytest.mark.parametrize("room", sorted(room_arrows()))
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    if room in ("lfmc", "__main__", "data", "demo"):
        assert room_arrows()[room] <= {"cli", "version"}
        return
    wrong = {other for other in room_arrows()[room] if not is_allowed(other, table()[room])}
    assert not wrong, f"lfmc.{room} may not import {sorted(wrong)}"


@pytest.mark.parametrize("room", sorted(table()))
def test_the_table_allows_nothing_that_no_one_imports(room: str) -> None:
    imported = room_arrows()[room]
    unused = {
        name
        for name in table()[room]
        if name != "-" and not any(is_allowed(other, frozenset({name})) for other in imported)
    }
    assert not unused, f"lfmc.{room} does not import {sorted(unused)}"
