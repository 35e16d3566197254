"""Every message that the page about errors quotes stands in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import REPO

PAGE = REPO / "docs" / "troubleshooting.md"
ERRORS = {"InputError", "UnsupportedError", "GateError"}
FOLDERS = ("lfmc", "calib_free", "passes", "targets")
GAP = "\0"

QUOTED = re.findall(r"^#### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.M)


def messages(source: str) -> Iterator[str]:
    """First arguments of errors that are raised; what is filled in is a gap."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            first = node.args[0]
            if node.func.id in ERRORS and isinstance(first, (ast.Constant, ast.JoinedStr)):
                yield text_of(first)


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)


def is_of(quoted: str, message: str) -> bool:
    """`...` stands for a gap, and so may a word: the start of a message is often a name."""
    literal = "".join(message.split(GAP))
    pattern = "(.+)".join(map(re.escape, message.split(GAP)))
    return re.fullmatch(pattern, quoted) is not None and 2 * len(literal) > len(quoted)


@pytest.fixture(scope="module")
def known() -> set[str]:
    files = [path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")]
    return {own for path in files for own in messages(Path(path).read_text(encoding="utf-8"))}


def test_messages_are_quoted_once() -> None:
    assert len(QUOTED) > 50
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_has_the_message(quoted: str, known: set[str]) -> None:
    assert any(is_of(quoted, message) for message in known), quoted


def test_other_messages_are_noticed(known: set[str]) -> None:
    assert not any(is_of("there is no such bundel", message) for message in known)
    assert is_of("tensor '...' is lost", f"tensor '{GAP}' is lost")
    assert not is_of("tensor is lost", f"tensor '{GAP}' is lost")
