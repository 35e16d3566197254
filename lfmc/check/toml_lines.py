"""Line numbers of the keys in a TOML file, which the TOML parser does not report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

KeyLines = Mapping[tuple[object, ...], int]

_TABLE = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?")
_KEY = re.compile(r"""\s*(["']?)([A-Za-z0-9_.-]+)\1\s*=""")


def find_key_lines(text: str) -> KeyLines:
    """Return the line (from 1) of every table and key, by path: `("export", 0, "max-kl")`."""
    lines: dict[tuple[object, ...], int] = {}
    counts: Counter[str] = Counter()
    table: tuple[object, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _TABLE.fullmatch(line), _KEY.match(line)
        if header:
            name = header[2]
            table = (*name.split("."), counts[name]) if header[1] == "[[" else (*name.split("."),)
            counts[name] += 1
            lines.setdefault(table, number)
        elif key:
            lines.setdefault((*table, *key[2].split(".")), number)
    return lines


def line_of(lines: KeyLines, path: Sequence[object]) -> int:
    """Return the line of a path, or of its closest parent that has a line; 1 if there is none."""
    for end in range(len(path), 0, -1):
        if tuple(path[:end]) in lines:
            return lines[tuple(path[:end])]
    return 1
