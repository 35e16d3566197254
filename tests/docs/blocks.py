"""Finds the code blocks of the pages, and the lfmc commands in them.

A test runs every block that follows `<!-- run -->`. The blocks of a page run in order, in one
folder. Options follow after a colon, separated by commas: `slow` (takes more than a few seconds),
`exit N` (the expected exit code), `needs TOOL` (the test is skipped without this program or Python
package).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).parents[2]
PAGES = (
    REPO / "README.md",
    *sorted((REPO / "docs").rglob("*.md")),
    *sorted((REPO / "examples").rglob("*.md")),
)

_FENCE = re.compile(
    r"(?:^<!-- run(?P<options>:[^>]*)? -->\n)?^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_INDENTED = re.compile(r"(?:^    \S[^\n]*\n)+", re.M)
_SPAN = re.compile(r"`(lfmc [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block that a test runs."""

    text: str
    slow: bool
    exit_code: int
    needs: tuple[str, ...]


def name_of(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def runnable(page: Path) -> list[Block]:
    """Return the blocks that follow `<!-- run -->`, in order."""
    return [
        _block(match["options"] or "", match["text"])
        for match in _FENCE.finditer(page.read_text(encoding="utf-8"))
        if match[0].startswith("<!--")
    ]


def _block(options: str, text: str) -> Block:
    slow, code, needs = False, 0, []
    for word in filter(None, (part.strip() for part in options.lstrip(":").split(","))):
        kind, _, value = word.partition(" ")
        if kind == "slow":
            slow = True
        elif kind == "exit":
            code = int(value)
        elif kind == "needs":
            needs.append(value)
        else:
            raise ValueError(f"a block has the unknown option '{word}'")
    return Block(text, slow, code, tuple(needs))


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every `lfmc` command in shell blocks, fenced or indented."""
    text = page.read_text(encoding="utf-8")
    blocks = [match["text"] for match in _FENCE.finditer(text) if match["language"] == "sh"]
    blocks += [
        re.sub(r"^    ", "", match[0], flags=re.M)
        for match in _INDENTED.finditer(_FENCE.sub("", text))
    ]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield from _commands(line)


def _commands(line: str) -> Iterator[list[str]]:
    if not re.match(r"(?:\w+=\S* )*lfmc ", line):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("|&;<>"):
            command.append(word)
            continue
        while command and "=" in command[0]:  # environment variables of the command
            command.pop(0)
        if command[:1] == ["lfmc"]:
            yield command[1:]
        command = []


def spans(page: Path) -> Iterator[str]:
    """Yield the commands inside sentences; they may be abbreviated."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (match[1] for match in _SPAN.finditer(text))


def site_module(name: str) -> ModuleType:
    """Import docs/site/NAME.py, which is in no package."""
    spec = spec_from_file_location(f"docs_site_{name}", REPO / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
