"""Run a saved ML program with torch, so that no Apple machine is needed to verify a package.

Operators follow the documentation of Core ML's MIL operators (opsets iOS15 to iOS18). There are two
modes:

exact      computes in float32 throughout, to verify the graph and the weights.
rounding   rounds every result to the dtype that the program declares for it, and still sums
           products in float32, to measure the effect of float16. (How the Neural Engine or a GPU
           sums is not modelled.)

An operator that is not in the table raises an error.
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
    """Execute the program of a package. The caller stores the states, as with MLState."""

    def __init__(self, folder: Path, *, exact: bool) -> None:
        self.program = load_program(folder)
        self.metadata: Mapping[str, str] = self.program.metadata
        self.exact = exact
        self._constants: dict[Any, Any] = {}
        self._matrices: dict[Any, Tensor] = {}
        self._first_by_name: dict[str, Any] = {}

    def new_state(self) -> dict[str, Tensor]:
        """Return zeros for every state in MLState."""
        from coremltools.converters.mil.mil import types

        inputs = self._function().inputs.items()
        return {name: self._zeros(var) for name, var in inputs if types.is_state(var.sym_type)}

    def new_io_states(self) -> dict[str, Tensor]:
        """Return zeros for every state that is passed as an input and an output."""
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
        inputs: Mapping[str, Tensor],
        state: dict[str, Tensor],
        watch: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Run a function, update `state`, and return its outputs and the variables in `watch`."""
        function = self.program.functions[name]
        values: dict[Any, Any] = {}
        for key, var in function.inputs.items():
            values[var] = _StateRef(state, key) if key in state else self._rounded(inputs[key], var)
        last_uses = _last_uses(function)
        results = {}
        for op in function.operations:
            self._run(op, values)
            for var in op.outputs:
                if var.name in watch:
                    results[var.name] = values[var]
            for var in last_uses.get(op, ()):
                values.pop(var, None)
        for var in function.outputs:
            results[var.name] = values[var]
        return results

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
                f"the interpreter does not support the operator '{kind}'",
                where=op.name,
                todo="run the package on a Mac",
            )
        arguments = {key: self._value(var, values) for key, var in op.inputs.items()}
        results = function(**{key: value for key, value in arguments.items() if value is not None})
        if not isinstance(results, (list, tuple)):
            results = [results]
        for var, result in zip(op.outputs, results, strict=True):
            values[var] = self._rounded(result, var)

    def _value(self, var: Any, values: Mapping[Any, Any]) -> Any:
        """Return a tensor, a list of tensors, or a constant: a number, a bool, text or a tensor."""
        if isinstance(var, (list, tuple)):
            return [self._value(element, values) for element in var]
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
        """Return a decompressed constant. Functions with an equal constant share the tensor."""
        if op not in self._matrices:
            first = self._first_by_name.setdefault(op.name, op)
            if first is not op and _equal_constants(first, op):
                self._matrices[op] = self._matrices[first]
            else:
                matrix = CONSTEXPR[op.op_type](**_parts(op))
                self._matrices[op] = self._rounded(matrix, op.outputs[0])
        return self._matrices[op]

    def _rounded(self, value: Any, var: Any) -> Any:
        from coremltools.converters.mil.mil import types

        if not isinstance(value, Tensor) or var.dtype is None:
            return value
        return value.to(self._dtype(DTYPES[types.builtin_to_string(var.dtype)]))

    def _dtype(self, declared: torch.dtype) -> torch.dtype:
        """Return the dtype in which this mode computes a value of a declared dtype."""
        return torch.float32 if self.exact and declared == torch.float16 else declared


class _StateRef:
    """A reference to a state that an operator reads or updates."""

    def __init__(self, state: dict[str, Tensor], name: str) -> None:
        self.state, self.name = state, name


def _parts(op: Any) -> dict[str, Any]:
    """Return the arrays of a compressed constant."""
    return {key: var.val for key, var in op.inputs.items() if var is not None}


def _equal_constants(a: Any, b: Any) -> bool:
    """Return whether two compressed constants have equal types and arrays."""
    a_parts, b_parts = _parts(a), _parts(b)
    return (
        a.op_type == b.op_type
        and a_parts.keys() == b_parts.keys()
        and all(np.array_equal(a_parts[key], b_parts[key]) for key in a_parts)
    )


def _last_uses(function: Any) -> dict[Any, list[Any]]:
    """Return, for each operator, the variables that no later operator reads."""
    last_reader: dict[Any, Any] = {}
    for op in function.operations:
        for var in op.inputs.values():
            for element in var if isinstance(var, (list, tuple)) else (var,):
                if element is not None:
                    last_reader[element] = op
    retained = set(function.outputs) | set(function.inputs.values())
    uses: dict[Any, list[Any]] = {}
    for var, op in last_reader.items():
        if var not in retained:
            uses.setdefault(op, []).append(var)
    return uses
