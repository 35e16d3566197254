"""Code blocks of the pages, and the commands of lfmc in them.

A block that follows `<!-- run -->` is run by a test, in the order of its page and in one folder.
Behind a colon it may say `slow` (more than some seconds), `exit N` (the code that it ends with),
`needs TOOL` (a program or a Python package without which it is skipped); several are separated by
commas.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
PAGES = (
    REPO / "README.md",
    *sorted((REPO / "docs").rglob("*.md")),
    *sorted((REPO / "examples").rglob("*.md")),
)

_FENCE = re.compile(
    r"(?:^<!-- run(?P<how>:[^>]*)? -->\n)?^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_INDENTED = re.compile(r"(?:^    \S[^\n]*\n)+", re.M)
_SPAN = re.compile(r"`(lfmc [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block that is to be run."""

    text: str
    slow: bool
    exit_code: int
    needs: tuple[str, ...]


def name_of(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def runnable(page: Path) -> list[Block]:
    """Blocks behind `<!-- run -->`, in order."""
    return [
        _block(found["how"] or "", found["text"])
        for found in _FENCE.finditer(page.read_text(encoding="utf-8"))
        if found[0].startswith("<!--")
    ]


def _block(how: str, text: str) -> Block:
    slow, code, needs = False, 0, []
    for word in filter(None, (part.strip() for part in how.lstrip(":").split(","))):
        kind, _, value = word.partition(" ")
        if kind == "slow":
            slow = True
        elif kind == "exit":
            code = int(value)
        elif kind == "needs":
            needs.append(value)
        else:
            raise ValueError(f"a block can't be run '{word}'")
    return Block(text, slow, code, tuple(needs))


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every `lfmc` command in blocks for a shell, fenced or indented."""
    text = page.read_text(encoding="utf-8")
    blocks = [found["text"] for found in _FENCE.finditer(text) if found["language"] == "sh"]
    blocks += [
        re.sub(r"^    ", "", found[0], flags=re.M)
        for found in _INDENTED.finditer(_FENCE.sub("", text))
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
        while command and "=" in command[0]:  # variables of this command
            command.pop(0)
        if command[:1] == ["lfmc"]:
            yield command[1:]
        command = []


def spans(page: Path) -> Iterator[str]:
    """Commands within a sentence; they may be shortened."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (found[1] for found in _SPAN.finditer(text))
