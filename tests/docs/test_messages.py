"""Every error message that docs/troubleshooting.md quotes is in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.blocks import REPO

PAGE = REPO / "docs" / "troubleshooting.md"
ERRORS = {"InputError", "UnsupportedError", "GateError"}
FOLDERS = ("lfmc", "calib_free", "passes", "targets")
GAP = "\0"

QUOTED = re.findall(r"^#### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.M)


def messages(source: str) -> Iterator[str]:
    """Yield the messages of the errors in the source; a gap stands for each formatted value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            first = node.args[0]
            if node.func.id in ERRORS and isinstance(first, (ast.Constant, ast.JoinedStr)):
                yield text_of(first)


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)


def is_quote(quoted: str, message: str) -> bool:
    """Return whether a quote matches a message; any text in the quote may stand for a gap."""
    literal = "".join(message.split(GAP))
    pattern = "(.+)".join(map(re.escape, message.split(GAP)))
    return re.fullmatch(pattern, quoted) is not None and 2 * len(literal) > len(quoted)


@pytest.fixture(scope="module")
def code_messages() -> set[str]:
    files = [path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")]
    return {text for path in files for text in messages(path.read_text(encoding="utf-8"))}


def test_messages_are_quoted_once() -> None:
    assert len(QUOTED) > 50
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_contains_the_message(quoted: str, code_messages: set[str]) -> None:
    assert any(is_quote(quoted, message) for message in code_messages), quoted


def test_other_messages_are_errors(code_messages: set[str]) -> None:
    assert not any(is_quote("there is no such bundel", message) for message in code_messages)
    assert is_quote("tensor '...' is lost", f"tensor '{GAP}' is lost")
    assert not is_quote("tensor is lost", f"tensor '{GAP}' is lost")
