"""Parse the sources of example apps, whose compilers are not on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from tree_sitter import Language, Node, Parser


def broken_lines(grammar: object, source: bytes) -> list[int]:
    """Return the lines, from 1, that do not parse; `grammar` comes from a tree-sitter package."""
    root = Parser(Language(grammar)).parse(source).root_node
    errors = (node for node in _walk(root) if node.type == "ERROR" or node.is_missing)
    return [node.start_point[0] + 1 for node in errors]


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)
