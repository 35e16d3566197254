"""What targets share that write a program as plain torch, by forms of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lfmc.graph.program import operator_name
from lfmc.targets.base import missing_form


@dataclass(frozen=True)
class Held:
    """A constant of the program that no operator has asked for yet, by the checkpoint's tensors
    that it is made of; `part` is `values`, or which of an n-bit matrix it is."""

    sources: tuple[str, ...]
    part: str = "values"


def call_plain(
    node: fx.Node, known: Mapping[fx.Node, Any], value: Callable[[Held], Tensor], target: str
) -> Any:
    """An operator that has no form, as it is; `value` is of its constants. `UnsupportedError` for
    one of lfmc's own."""
    if operator_name(node).startswith("lfm."):
        raise missing_form(node, target)

    def operand(argument: fx.Node) -> Any:
        found = known[argument]
        return value(found) if isinstance(found, Held) else found

    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _dequantize(forms: Any, codes: Held, *rest: Any) -> Held:
    return codes


def _getitem(forms: Any, values: Any, index: int) -> Any:
    return values[index]


# Forms of what computes nothing.
PASSED: Mapping[str, Callable[..., Any]] = {"getitem": _getitem, "lfm.dequantize": _dequantize}
