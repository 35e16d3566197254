"""Runs a saved ML program with torch: no Apple machine is needed to see what a package computes.

Operators follow the descriptions of Core ML's MIL operators (opsets iOS15 to iOS18). Two ways:

exact      float32 throughout: is the graph right, are the weights right?
rounding   every result is rounded to the dtype that the program declares for it, products are
           still summed in float32: what float16 does to this model. (How the Neural Engine or a
           GPU sums is not modelled.)

An operator that is not in the table is an error, never skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import UnsupportedError
from lfmc.targets.coreml.names import output_name
from lfmc.targets.coreml.operators import CONSTEXPR, OPERATORS
from lfmc.targets.coreml.package import load_program

DTYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class Interpreter:
    """The program of a package; `states` are held by whoever calls, as with Core ML's MLState."""

    def __init__(self, folder: Path, *, exact: bool) -> None:
        self.program = load_program(folder)
        self.metadata: Mapping[str, str] = self.program.metadata
        self.exact = exact
        self._constants: dict[Any, Any] = {}
        self._matrices: dict[Any, Tensor] = {}
        self._named: dict[str, Any] = {}

    def new_state(self) -> dict[str, Tensor]:
        """Zeros for every state that the system keeps."""
        from coremltools.converters.mil.mil import types

        inputs = self._function().inputs.items()
        return {name: self._zeros(var) for name, var in inputs if types.is_state(var.sym_type)}

    def new_passed(self) -> dict[str, Tensor]:
        """Zeros for every state that is an input, with an output that continues it."""
        outputs = {var.name for var in self._function().outputs}
        inputs = self._function().inputs.items()
        return {name: self._zeros(var) for name, var in inputs if output_name(name) in outputs}

    def _function(self) -> Any:
        return self.program.functions[self.program.default_function_name]

    def _zeros(self, var: Any) -> Tensor:
        shape = [int(size) for size in var.shape]
        return torch.zeros(shape, dtype=self._dtype(torch.float16))

    def call(
        self,
        name: str,
        given: Mapping[str, Tensor],
        state: dict[str, Tensor],
        watch: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Outputs of a function by name, and of variables in `watch`; `state` is updated."""
        function = self.program.functions[name]
        values: dict[Any, Any] = {}
        for key, var in function.inputs.items():
            values[var] = _Held(state, key) if key in state else self._rounded(given[key], var)
        last = _last_uses(function)
        found = {}
        for op in function.operations:
            self._run(op, values)
            for var in op.outputs:
                if var.name in watch:
                    found[var.name] = values[var]
            for var in last.get(op, ()):
                values.pop(var, None)
        for var in function.outputs:
            found[var.name] = values[var]
        return found

    def _run(self, op: Any, values: dict[Any, Any]) -> None:
        kind = op.op_type
        if kind == "const":
            return
        if kind in CONSTEXPR:
            values[op.outputs[0]] = self._matrix(op)
            return
        function = OPERATORS.get(kind)
        if function is None or op.blocks:
            raise UnsupportedError(
                f"the interpreter does not know the operator '{kind}'",
                where=op.name,
                todo="run the package on a Mac",
            )
        given = {key: self._value(var, values) for key, var in op.inputs.items()}
        results = function(**{key: value for key, value in given.items() if value is not None})
        if not isinstance(results, (list, tuple)):
            results = [results]
        for var, result in zip(op.outputs, results, strict=True):
            values[var] = self._rounded(result, var)

    def _value(self, var: Any, values: Mapping[Any, Any]) -> Any:
        """A tensor, a list of them, or a constant: a number, a bool, text or a tensor."""
        if isinstance(var, (list, tuple)):
            return [self._value(each, values) for each in var]
        if var is None or var in values:
            return None if var is None else values[var]
        if var not in self._constants:
            self._constants[var] = self._constant(var)
        return self._constants[var]

    def _constant(self, var: Any) -> Any:
        value = var.val
        if isinstance(value, (str, bool, int, float)) or value is None:
            return value
        array = np.asarray(value)
        if array.dtype.kind == "U":
            return str(array)
        return self._rounded(
            torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape), var
        )

    def _matrix(self, op: Any) -> Tensor:
        """A constant that is stored compressed; functions that have the same one share it."""
        if op not in self._matrices:
            twin = self._named.setdefault(op.name, op)
            if twin is not op and _same(twin, op):
                self._matrices[op] = self._matrices[twin]
            else:
                made = CONSTEXPR[op.op_type](**_parts(op))
                self._matrices[op] = self._rounded(made, op.outputs[0])
        return self._matrices[op]

    def _rounded(self, value: Any, var: Any) -> Any:
        from coremltools.converters.mil.mil import types

        if not isinstance(value, Tensor) or var.dtype is None:
            return value
        return value.to(self._dtype(DTYPES[types.builtin_to_string(var.dtype)]))

    def _dtype(self, declared: torch.dtype) -> torch.dtype:
        """What a value of a declared dtype is held in."""
        return torch.float32 if self.exact and declared == torch.float16 else declared


class _Held:
    """A state that an operator reads or updates."""

    def __init__(self, state: dict[str, Tensor], name: str) -> None:
        self.state, self.name = state, name


def _parts(op: Any) -> dict[str, Any]:
    """The arrays of a compressed constant."""
    return {key: var.val for key, var in op.inputs.items() if var is not None}


def _same(a: Any, b: Any) -> bool:
    """Whether two compressed constants are one and the same."""
    ours, theirs = _parts(a), _parts(b)
    return (
        a.op_type == b.op_type
        and ours.keys() == theirs.keys()
        and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    )


def _last_uses(function: Any) -> dict[Any, list[Any]]:
    """Variables that nothing needs after an operator: what may be forgotten there."""
    last: dict[Any, Any] = {}
    for op in function.operations:
        for var in op.inputs.values():
            for each in var if isinstance(var, (list, tuple)) else (var,):
                if each is not None:
                    last[each] = op
    kept = set(function.outputs) | set(function.inputs.values())
    uses: dict[Any, list[Any]] = {}
    for var, op in last.items():
        if var not in kept:
            uses.setdefault(op, []).append(var)
    return uses
