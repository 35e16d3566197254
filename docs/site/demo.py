"""Writes what `make demo` prints into docs/demo.md, and a few of its lines into README.md.

    make -s demo >build/demo.txt
    python docs/site/demo.py build/demo.txt

tests/docs/test_demo.py compares both pages with a run.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "demo.md", ROOT / "README.md"
BLOCK = re.compile(r"(<!-- demo -->\n```\n).*?(```\n<!-- /demo -->)", re.DOTALL)
IN_README = re.compile(r"^(parity 4|perplexity|size on disk)")


def main() -> None:
    """Update both pages with the output in the file that the command line names."""
    lines = [line.rstrip() for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    replace_block(PAGE, lines)
    replace_block(README, [line for line in lines if IN_README.match(line)])


def replace_block(page: Path, lines: list[str]) -> None:
    """Put the lines between the marks of a page."""
    text = "".join(f"{line}\n" for line in lines)
    before = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(lambda match: match[1] + text + match[2], before), encoding="utf-8")


def read_block(page: Path) -> list[str]:
    """Return the lines between the marks of a page."""
    match = BLOCK.search(page.read_text(encoding="utf-8"))
    assert match is not None, page
    return match[0].splitlines()[2:-2]


if __name__ == "__main__":
    main()
