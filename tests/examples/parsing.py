"""Parsing sources of example apps, whose compilers are not on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from tree_sitter import Language, Node, Parser


def broken_lines(grammar: object, source: bytes) -> list[int]:
    """Lines, from 1, where a source does not parse; `grammar` is what a tree-sitter package has."""
    root = Parser(Language(grammar)).parse(source).root_node
    wrong = (node for node in _walk(root) if node.type == "ERROR" or node.is_missing)
    return [node.start_point[0] + 1 for node in wrong]


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)
