"""Shared code of targets that first rewrite a program in plain torch operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lfmc.graph.program import operator_name
from lfmc.targets.base import unsupported_operator


@dataclass(frozen=True)
class ConstantRef:
    """A constant of the program that is not loaded yet.

    `sources` are the checkpoint tensors that it consists of. `part` is `values`, or the part of an
    n-bit matrix (`codes`, `scales` or `zeros`).
    """

    sources: tuple[str, ...]
    part: str = "values"


def call_torch_operator(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    load: Callable[[ConstantRef], Tensor],
    target: str,
) -> Any:
    """Call the torch operator of a node for which the target has no function of its own.

    `values` are the results of earlier nodes; `load` reads a constant. Raises `UnsupportedError`
    for an operator of lfmc.
    """
    if operator_name(node).startswith("lfm."):
        raise unsupported_operator(node, target)

    def operand(argument: fx.Node) -> Any:
        value = values[argument]
        return load(value) if isinstance(value, ConstantRef) else value

    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _dequantize(forms: Any, codes: ConstantRef, *rest: Any) -> ConstantRef:
    return codes


def _getitem(forms: Any, values: Any, index: int) -> Any:
    return values[index]


# Functions of the operators that compute nothing.
PASS_THROUGH: Mapping[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "lfm.dequantize": _dequantize,
}
