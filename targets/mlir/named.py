"""The program's operators as named operators of torch's dialect, each with its definition.

    %y = torch.operator "torch.lfm.linear_nbits"(%x, %codes, %scales, %form)

`%form` is JSON: `definition` is a function of the module that takes the same tensors and says what
the operator does; `results` are shapes, all of float32; `parameters` the names of the last tensors
in `params.safetensors`; the others are the operator's numbers. Operators of the same shapes and
numbers share a definition. A compiler takes those it has a kernel for, and calls the definitions of
the rest, as `inline` does for IREE with all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch_mlir import ir

from lfmc.targets.mlir.dialects import IMPORTED, run_passes
from lfmc.targets.shared.parameters_file import Parameter

NAMESPACE, SHOWN = "lfm_mlir", "lfm"  # of operators while a graph is traced, and in a module
INLINED = f"inline,symbol-dce,{IMPORTED}"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Given = Callable[[Parameter], Tensor]
Handler = Callable[..., Any]  # of what gives parameters, and an operator's arguments


@dataclass(frozen=True)
class Definition:
    """`function` of tensors like `inputs`, once traced, is a function of the module."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]


class Named:
    """Replaces calls of operators while a graph is traced, and collects their definitions."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Definition] = {}

    @property
    def definitions(self) -> list[Definition]:
        return list(self._known.values())

    def call(self, name: str, handler: Handler, given: Given, args: Sequence[Any]) -> Any:
        """An operator's results, by name; what its handler does now is dead code of the graph."""
        used: dict[str, Parameter] = {}

        def noted(own: Parameter) -> Tensor:
            used[own.name] = own
            return given(own)

        found = handler(noted, *args)
        results = found if isinstance(found, tuple) else (found,)
        leaves, tree = tree_flatten(tuple(args))
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [*(leaves[at] for at in places), *map(given, used.values())]
        numbers = _numbers(name, args)

        def function(*values: Tensor) -> Any:
            own = dict(zip(used, values[len(places) :], strict=True))
            filled = list(leaves)
            for at, value in zip(places, values, strict=False):
                filled[at] = value
            return handler(lambda p: own[p.name], *tree_unflatten(filled, tree))

        parts = tuple(own.name.partition("#")[2] for own in used.values())
        shapes = tuple((tuple(value.shape), value.dtype) for value in tensors)
        nothing = tuple(at for at, leaf in enumerate(leaves) if leaf is None)
        key = (name, tree, tuple(numbers.items()), parts, shapes, nothing)
        if key not in self._known:
            own = f"{SHOWN}.{name}.{len(self._known)}"
            self._known[key] = Definition(own, function, tuple(map(torch.empty_like, tensors)))
        form = {
            "definition": self._known[key].name,
            "results": [list(value.shape) for value in results],
            "parameters": list(used),
            **numbers,
        }
        made = _operator(name, len(tensors), len(results))(*tensors, json.dumps(form))
        return tuple(made) if isinstance(found, tuple) else made


def _numbers(name: str, args: Sequence[Any]) -> dict[str, Any]:
    """What an operator is told besides tensors, by the names it has in `lfmc.graph.ops`."""
    schema = getattr(torch.ops.lfm, name).default._schema
    pairs = zip(schema.arguments, args, strict=True)
    return {own.name: value for own, value in pairs if isinstance(value, int | float | str)}


@cache
def _operator(name: str, inputs: int, results: int) -> Callable[..., Any]:
    """An operator of so many tensors and a form, traced without being looked into."""
    own = f"{name}.in{inputs}_out{results}"
    given = ", ".join(f"Tensor t{at}" for at in range(inputs))
    kinds = ", ".join(["Tensor"] * results)
    _LIBRARY.define(f"{own}({given}, str form) -> ({kinds})")

    def shapes(first: Tensor, *rest: Any) -> Any:
        made = [
            first.new_empty(shape, dtype=torch.float32) for shape in json.loads(rest[-1])["results"]
        ]
        return made[0] if results == 1 else tuple(made)

    torch.library.register_fake(f"{NAMESPACE}::{own}", shapes, lib=_LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    found: Callable[..., Any] = getattr(packet, f"in{inputs}_out{results}")
    return found


def show(module: Any, definitions: Sequence[Definition]) -> None:
    """Give operators their names in an imported module, and make their definitions private."""
    with module.context:
        for operation in _named(module, NAMESPACE):
            _, _, own, _ = ir.StringAttr(operation.attributes["name"]).value.split(".")
            operation.attributes["name"] = ir.StringAttr.get(f"torch.{SHOWN}.{own}")
        private = {own.name for own in definitions}
        for function in module.body.operations:
            if ir.StringAttr(function.attributes["sym_name"]).value in private:
                function.attributes["sym_visibility"] = ir.StringAttr.get("private")


def inline(module: Any) -> None:
    """Write every named operator as its definition says."""
    with module.context:
        for operation in _named(module, SHOWN):
            *tensors, form = operation.operands
            text = ir.StringAttr(form.owner.attributes["value"]).value
            callee = ir.FlatSymbolRefAttr.get(json.loads(text)["definition"])
            with ir.InsertionPoint(operation), operation.location:
                call = ir.Operation.create(
                    "func.call",
                    results=[value.type for value in operation.results],
                    operands=tensors,
                    attributes={"callee": callee},
                )
            for old, new in zip(operation.results, call.results, strict=True):
                old.replace_all_uses_with(new)
            operation.erase()
    run_passes(module, INLINED)


def _named(module: Any, namespace: str) -> list[Any]:
    """Operators of a namespace, in order."""
    found: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == "torch.operator":
            name: str = ir.StringAttr(operation.attributes["name"]).value
            if name.startswith(f"torch.{namespace}."):
                found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found
