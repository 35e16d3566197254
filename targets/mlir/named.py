"""The program's operators as named operators of torch's dialect, each with its definition.

    %y = torch.operator "torch.lfm.linear_nbits"(%x, %codes, %scales, %form)

`%form` is JSON. `definition` is a function of the module that takes the same tensors and computes
the operator. `results` are shapes, all of float32. `parameters` are the names of the last tensors
in `params.safetensors`. The other keys are the operator's numbers. Operators of equal shapes and
numbers share a definition. A compiler maps an operator to a kernel of its own, or calls its
definition. For IREE, `inline` replaces all operators by their definitions.
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

from lfmc.targets.mlir.dialects import IMPORT_PIPELINE, run_passes
from lfmc.targets.shared.parameters_file import Parameter

# Namespaces of operators while a graph is traced, and in a module.
NAMESPACE, MODULE_NAMESPACE = "lfm_mlir", "lfm"
INLINE_PIPELINE = f"inline,symbol-dce,{IMPORT_PIPELINE}"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

LoadParameter = Callable[[Parameter], Tensor]
Handler = Callable[..., Any]  # takes a `LoadParameter`, then an operator's arguments


@dataclass(frozen=True)
class Definition:
    """A function of the module, traced from `function` with tensors like `inputs`."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]


class NamedOperators:
    """Replaces operator calls while a graph is traced, and collects the definitions."""

    def __init__(self) -> None:
        self._definitions: dict[Hashable, Definition] = {}

    @property
    def definitions(self) -> list[Definition]:
        return list(self._definitions.values())

    def call(self, name: str, handler: Handler, load: LoadParameter, args: Sequence[Any]) -> Any:
        """Return the results of a named operator; the handler's own operations are dead code."""
        used: dict[str, Parameter] = {}

        def record(parameter: Parameter) -> Tensor:
            used[parameter.name] = parameter
            return load(parameter)

        output = handler(record, *args)
        results = output if isinstance(output, tuple) else (output,)
        leaves, tree = tree_flatten(tuple(args))
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [*(leaves[index] for index in positions), *map(load, used.values())]
        numbers = _numbers(name, args)

        def function(*values: Tensor) -> Any:
            parameters = dict(zip(used, values[len(positions) :], strict=True))
            arguments = list(leaves)
            for index, value in zip(positions, values, strict=False):
                arguments[index] = value
            return handler(lambda p: parameters[p.name], *tree_unflatten(arguments, tree))

        parts = tuple(parameter.name.partition("#")[2] for parameter in used.values())
        shapes = tuple((tuple(value.shape), value.dtype) for value in tensors)
        absent = tuple(index for index, leaf in enumerate(leaves) if leaf is None)
        key = (name, tree, tuple(numbers.items()), parts, shapes, absent)
        if key not in self._definitions:
            identifier = f"{MODULE_NAMESPACE}.{name}.{len(self._definitions)}"
            inputs = tuple(map(torch.empty_like, tensors))
            self._definitions[key] = Definition(identifier, function, inputs)
        form = {
            "definition": self._definitions[key].name,
            "results": [list(value.shape) for value in results],
            "parameters": list(used),
            **numbers,
        }
        named_output = _operator(name, len(tensors), len(results))(*tensors, json.dumps(form))
        return tuple(named_output) if isinstance(output, tuple) else named_output


def _numbers(name: str, args: Sequence[Any]) -> dict[str, Any]:
    """Return an operator's arguments that are no tensors, by their names in `lfmc.graph.ops`."""
    schema = getattr(torch.ops.lfm, name).default._schema
    pairs = zip(schema.arguments, args, strict=True)
    return {
        argument.name: value for argument, value in pairs if isinstance(value, int | float | str)
    }


@cache
def _operator(name: str, inputs: int, results: int) -> Callable[..., Any]:
    """Define an operator of `inputs` tensors and a form, which tracing keeps as one node."""
    operator = f"{name}.in{inputs}_out{results}"
    parameters = ", ".join(f"Tensor t{index}" for index in range(inputs))
    types = ", ".join(["Tensor"] * results)
    _LIBRARY.define(f"{operator}({parameters}, str form) -> ({types})")

    def make_fake_results(first: Tensor, *rest: Any) -> Any:
        shapes = json.loads(rest[-1])["results"]
        tensors = [first.new_empty(shape, dtype=torch.float32) for shape in shapes]
        return tensors[0] if results == 1 else tuple(tensors)

    torch.library.register_fake(f"{NAMESPACE}::{operator}", make_fake_results, lib=_LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    overload: Callable[..., Any] = getattr(packet, f"in{inputs}_out{results}")
    return overload


def publish_operators(module: Any, definitions: Sequence[Definition]) -> None:
    """Rename the operators of an imported module, and make their definitions private."""
    with module.context:
        for operation in _find_operators(module, NAMESPACE):
            _, _, name, _ = ir.StringAttr(operation.attributes["name"]).value.split(".")
            operation.attributes["name"] = ir.StringAttr.get(f"torch.{MODULE_NAMESPACE}.{name}")
        private = {definition.name for definition in definitions}
        for function in module.body.operations:
            if ir.StringAttr(function.attributes["sym_name"]).value in private:
                function.attributes["sym_visibility"] = ir.StringAttr.get("private")


def inline(module: Any) -> None:
    """Replace every named operator by its definition."""
    with module.context:
        for operation in _find_operators(module, MODULE_NAMESPACE):
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
    run_passes(module, INLINE_PIPELINE)


def _find_operators(module: Any, namespace: str) -> list[Any]:
    """Return the operators of a namespace, in order."""
    operators: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == "torch.operator":
            name: str = ir.StringAttr(operation.attributes["name"]).value
            if name.startswith(f"torch.{namespace}."):
                operators.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return operators
