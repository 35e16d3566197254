"""A hook of mkdocs: the page of the command line, from the commands themselves.

`mkdocs-click` joins the lines of an example (click marks it with `\\b`) into one paragraph. This
hook calls the same generator (private: pyproject.toml pins its version) and makes each example a
block of code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mkdocs_click._docs import _recursively_make_command_docs

from lfmc.cli import cli

MARKER = "<!-- commands -->"
KEEP_LINES = "\b"  # click: the lines of the paragraph behind this character are kept


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the marker with the commands; mkdocs calls this for each page."""
    if MARKER not in markdown:
        return markdown
    lines = _recursively_make_command_docs("lfmc", cli, depth=1, has_attr_list=True)
    return markdown.replace(MARKER, "\n".join(fence_examples(lines)))


def fence_examples(lines: Iterable[str]) -> Iterator[str]:
    """Put each paragraph that click would not wrap into a block of shell code."""
    in_example = False
    for line in lines:
        if line.strip(" ") == KEEP_LINES:
            in_example = True
            yield "```sh"
        elif in_example and not line.strip():
            in_example = False
            yield from ("```", "")
        else:
            yield line
    if in_example:
        yield "```"
