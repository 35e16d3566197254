"""Where keys stand in a TOML file: its parser does not tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

Lines = Mapping[tuple[object, ...], int]

_TABLE = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?")
_KEY = re.compile(r"""\s*(["']?)([A-Za-z0-9_.-]+)\1\s*=""")


def lines_of(text: str) -> Lines:
    """The line (from 1) of every table and key, by path: `("export", 0, "max-kl")`."""
    found: dict[tuple[object, ...], int] = {}
    counts: Counter[str] = Counter()
    table: tuple[object, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _TABLE.fullmatch(line), _KEY.match(line)
        if header:
            name = header[2]
            table = (*name.split("."), counts[name]) if header[1] == "[[" else (*name.split("."),)
            counts[name] += 1
            found.setdefault(table, number)
        elif key:
            found.setdefault((*table, *key[2].split(".")), number)
    return found


def line_of(lines: Lines, place: Sequence[object]) -> int:
    """The line of a place, or of what it stands in; 1 for the file itself."""
    for end in range(len(place), 0, -1):
        if tuple(place[:end]) in lines:
            return lines[tuple(place[:end])]
    return 1
