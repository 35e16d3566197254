"""Compilation for IREE, with parameters mapped from a file and states as variables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import iree.compiler.tools as compiler

from lfmc.errors import UnsupportedError
from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.graphs import PREPARE, FunctionSpec, Graphs, state_shape
from lfmc.targets.mlir.runtime import RESET, SCOPE
from lfmc.targets.shared.parameters_file import Parameter

TYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "uint8": "i8",
    "int8": "i8",
    "int32": "i32",
}
FLAGS = (
    # Matrices stay packed: unpacked at load time they would take four bytes per weight.
    "--iree-opt-const-expr-hoisting=false",
    "--iree-vm-bytecode-module-strip-source-map",
    "--iree-vm-bytecode-module-strip-debug-ops",
)


def add_host_functions(module: Any, graphs: Graphs) -> str:
    """Return the module's text with functions that only take tokens and a start position.

    They call the graphs' functions. Parameters are mapped; states are variables, which are written
    in place.
    """
    text = str(module).replace("xui8>", "xi8>")  # linalg's operators encode the signedness
    for name in [*(function.name for function in graphs.functions), PREPARE]:
        text = text.replace(f"func.func @{name}(", f"func.func private @{name}_graph(")
    parts = [
        _declare_parameter(index, parameter, graphs)
        for index, parameter in enumerate(graphs.parameters)
    ]
    states = [_tensor_type(state_shape(spec), "float32") for spec in graphs.program.states]
    parts += [f"util.global private mutable @s{i} : {state}" for i, state in enumerate(states)]
    if graphs.packed:
        parts.append(_prepare_initializer(graphs))
    parts += [_function(function, graphs, states) for function in graphs.functions]
    parts.append(_reset_function(states))
    body, _, _ = text.rpartition("}")
    return "\n".join([body, *parts, "}", ""])


def compile_module(text: str, device: Device, path: Path) -> None:
    """Compile for a device; raises `UnsupportedError` with IREE's message."""
    try:
        compiler.compile_str(
            text, target_backends=[], extra_args=[*device.flags, *FLAGS], output_file=str(path)
        )
    except compiler.CompilerToolError as error:
        lines = [line for line in str(error).splitlines() if "error:" in line]
        raise UnsupportedError(
            f"IREE can't compile the model for {device.name}", got=(lines or [str(error)])[0]
        ) from error


def _tensor_type(shape: Sequence[int], dtype: str) -> str:
    return f"tensor<{'x'.join([*map(str, shape), TYPES[dtype]])}>"


def _parameter_type(parameter: Parameter) -> str:
    return _tensor_type(parameter.shape, parameter.dtype)


def _declare_parameter(index: int, parameter: Parameter, graphs: Graphs) -> str:
    source = f'#flow.parameter.named<"{SCOPE}"::"{parameter.name}">'
    argument = graphs.arguments[index]
    stored = graphs.arithmetic.as_argument(parameter)
    lines = [f"util.global private @p{index} = {source} : {_parameter_type(stored)}"]
    if parameter in graphs.packed:
        lines.append(f"util.global private mutable @z{index} : {_parameter_type(argument)}")
    return "\n".join(lines)


def _prepare_initializer(graphs: Graphs) -> str:
    indices = [graphs.parameters.index(parameter) for parameter in graphs.packed]
    stored = [graphs.arithmetic.as_argument(parameter) for parameter in graphs.packed]
    types = [_parameter_type(parameter) for parameter in stored]
    results = [_parameter_type(graphs.arguments[index]) for index in indices]
    lines = ["util.initializer {"]
    lines += [
        f"  %p{index} = util.global.load @p{index} : {tensor_type}"
        for index, tensor_type in zip(indices, types, strict=True)
    ]
    values = ", ".join(f"%p{i}" for i in indices)
    signature = f"({', '.join(types)}) -> ({', '.join(results)})"
    lines.append(f"  %r:{len(indices)} = func.call @{PREPARE}_graph({values}) : {signature}")
    for position, (index, tensor_type) in enumerate(zip(indices, results, strict=True)):
        lines.append(f"  util.global.store %r#{position}, @z{index} : {tensor_type}")
    return "\n".join([*lines, "  util.return", "}"])


def _function(function: FunctionSpec, graphs: Graphs, states: Sequence[str]) -> str:
    inputs = [_tensor_type((n,), "int32") for n in (function.tokens, 1)]
    rows = 1 if function.last_only else function.tokens
    logits = _tensor_type((rows, graphs.program.config.vocab_size), "float32")
    lines = [
        f"func.func @{function.name}(%tokens: {inputs[0]}, %start: {inputs[1]}) -> {logits} {{"
    ]
    operands, operand_types = ["%tokens", "%start"], [*inputs]

    def load(name: str, tensor_type: str) -> None:
        lines.append(f"  %{name} = util.global.load @{name} : {tensor_type}")
        operands.append(f"%{name}")
        operand_types.append(tensor_type)

    for index, tensor_type in enumerate(states):
        load(f"s{index}", tensor_type)
    for index, parameter in enumerate(graphs.parameters):
        prefix = "z" if parameter in graphs.packed else "p"
        load(f"{prefix}{index}", _parameter_type(graphs.arguments[index]))
    results = f"({', '.join([logits, *states])})"
    signature = f"({', '.join(operand_types)}) -> {results}"
    call = f"func.call @{function.name}_graph({', '.join(operands)}) : {signature}"
    lines.append(f"  %r:{1 + len(states)} = {call}")
    for index, tensor_type in enumerate(states):
        lines.append(f"  util.global.store %r#{index + 1}, @s{index} : {tensor_type}")
    return "\n".join([*lines, f"  return %r#0 : {logits}", "}"])


def _reset_function(states: Sequence[str]) -> str:
    """Return the code that fills every state with zeros, at load time and in `reset`.

    IREE merges equal constants into one buffer, so that a write to one state in place would change
    the others. Barriers hide from IREE that the zeros are equal.
    """
    lines = []
    for index, tensor_type in enumerate(states):
        lines += [
            f"  %c{index} = arith.constant 0.0 : f32",
            f"  %z{index} = util.optimization_barrier %c{index} : f32",
            f"  %s{index} = flow.tensor.splat %z{index} : {tensor_type}",
            f"  util.global.store %s{index}, @s{index} : {tensor_type}",
        ]
    body = "\n".join(lines)
    initializer = f"util.initializer {{\n{body}\n  util.return\n}}"
    return f"{initializer}\nfunc.func @{RESET}() {{\n{body}\n  return\n}}"
