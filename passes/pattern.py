"""A small pattern matcher for `fx` graphs. Patterns are data that look like printed graphs.

`Op("aten.mul", X, Op("aten.sigmoid", X))` matches a node and its inputs. `Var("x")` binds any
value; each occurrence of the name must bind the same value. Default arguments are filled in before
arguments are compared, so `linear(x, w)` and `linear(x, w, None)` are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lfmc.graph.program import operator_name

COMMUTATIVE = frozenset({"aten.add", "aten.mul", "aten.__and__"})
PLACEMENT = frozenset({"device", "layout", "pin_memory"})
ANY = object()


@dataclass(frozen=True)
class Var:
    """Binds any value to a name; further occurrences must be the same value."""

    name: str


@dataclass(frozen=True)
class Op:
    """A call of one operator; arguments that are left out must have their defaults.

    `device`, `layout` and `pin_memory` may have any value. `bind` binds the node itself to a name.
    """

    name: str
    args: tuple[Any, ...]
    bind: str | None = None

    def __init__(self, name: str, *args: Any, bind: str | None = None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "bind", bind)


@dataclass(frozen=True)
class OneOf:
    """Matches if one of several patterns matches; the first match counts."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        object.__setattr__(self, "options", options)


@dataclass
class Match:
    """The values of a pattern's variables, and the nodes that the pattern covers."""

    values: dict[str, Any] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def node(self, name: str) -> fx.Node:
        value = self.values[name]
        if not isinstance(value, fx.Node):
            raise TypeError(f"pattern variable '{name}' is {value!r}, not a node")
        return value

    def copy(self) -> Match:
        return Match(dict(self.values), list(self.nodes))

    def is_private(self, *shared: str) -> bool:
        """Return whether only the pattern uses its inner nodes.

        The root, and nodes bound to the names `shared`, may have other users.
        """
        nodes = set(self.nodes)
        shared_nodes = {self.values[name] for name in shared}
        root, *inner = self.nodes
        return all(set(n.users) <= nodes for n in inner if n not in shared_nodes and n is not root)


def match_pattern(pattern: Any, node: Any) -> Match | None:
    """Match `node`, a graph node or an argument, against a pattern; None if it does not match."""
    return _match(pattern, node, Match())


def arguments(node: fx.Node) -> list[Any]:
    """Return all arguments of a call, with defaults, in the order of the operator's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args)
    values = list(node.args)
    for argument in node.target._schema.arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return values


def _match(pattern: Any, value: Any, state: Match) -> Match | None:
    if pattern is ANY:
        return state
    if isinstance(pattern, Var):
        if pattern.name in state.values:
            return state if state.values[pattern.name] == value else None
        state.values[pattern.name] = value
        return state
    if isinstance(pattern, OneOf):
        for option in pattern.options:
            match = _match(option, value, state.copy())
            if match:
                return match
        return None
    if isinstance(pattern, Op):
        return _match_op(pattern, value, state)
    if isinstance(pattern, (list, tuple)):
        return _match_list(pattern, value, state)
    return state if type(pattern) is type(value) and pattern == value else None


def _match_op(pattern: Op, node: Any, state: Match) -> Match | None:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if operator_name(node) != pattern.name:
        return None
    state.nodes.append(node)
    if pattern.bind is not None:
        state.values[pattern.bind] = node
    values = arguments(node)
    if isinstance(node.target, torch._ops.OpOverload):
        count = len(pattern.args)
        schema = node.target._schema.arguments[count:]
        for value, argument in zip(values[count:], schema, strict=True):
            if argument.name not in PLACEMENT and value != argument.default_value:
                return None
        values = values[:count]
    orders = [values]
    if pattern.name in COMMUTATIVE and len(values) == 2:
        orders.append(values[::-1])
    for order in orders:
        match = _match_list(pattern.args, order, state.copy())
        if match:
            return match
    return None


def _match_list(patterns: Any, values: Any, state: Match) -> Match | None:
    if not isinstance(values, (list, tuple)) or len(patterns) != len(values):
        return None
    current: Match | None = state
    for pattern, value in zip(patterns, values, strict=True):
        current = _match(pattern, value, current) if current else None
    return current
