"""A module for IREE: parameters become its own, mapped from a file, and it is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import iree.compiler.tools as compiler

from lfmc.errors import UnsupportedError
from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.graphs import PREPARE, Graphs, Kind, state_shape
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
    # Matrices stay as they lie: unpacked at load, they would take four bytes a weight.
    "--iree-opt-const-expr-hoisting=false",
    "--iree-vm-bytecode-module-strip-source-map",
    "--iree-vm-bytecode-module-strip-debug-ops",
)


def with_parameters(module: Any, graphs: Graphs) -> str:
    """The module's text, with functions of tokens only around the graphs': parameters are mapped,
    states are variables, which are written in place."""
    text = str(module).replace("xui8>", "xi8>")  # linalg's operators say what is unsigned
    for name in [*(kind.name for kind in graphs.kinds), PREPARE]:
        text = text.replace(f"func.func @{name}(", f"func.func private @{name}_graph(")
    parts = [_parameter(index, own, graphs) for index, own in enumerate(graphs.parameters)]
    states = [_tensor(state_shape(spec), "float32") for spec in graphs.program.states]
    parts += [f"util.global private mutable @s{i} : {kind}" for i, kind in enumerate(states)]
    if graphs.packed:
        parts.append(_initializer(graphs))
    parts += [_function(kind, graphs, states) for kind in graphs.kinds]
    parts.append(_reset(states))
    body, _, _ = text.rpartition("}")
    return "\n".join([body, *parts, "}", ""])


def compile_module(text: str, device: Device, path: Path) -> None:
    """Compile for a device; raises `UnsupportedError` with what IREE says."""
    try:
        compiler.compile_str(
            text, target_backends=[], extra_args=[*device.flags, *FLAGS], output_file=str(path)
        )
    except compiler.CompilerToolError as error:
        lines = [line for line in str(error).splitlines() if "error:" in line]
        raise UnsupportedError(
            f"IREE can't compile the model for {device.name}", got=(lines or [str(error)])[0]
        ) from error


def _tensor(shape: Sequence[int], dtype: str) -> str:
    return f"tensor<{'x'.join([*map(str, shape), TYPES[dtype]])}>"


def _type(own: Parameter) -> str:
    return _tensor(own.shape, own.dtype)


def _parameter(index: int, own: Parameter, graphs: Graphs) -> str:
    held = f'util.global private @p{index} = #flow.parameter.named<"{SCOPE}"::"{own.name}">'
    given = graphs.given[index]
    stored = graphs.dialect.as_given(own)
    lines = [f"{held} : {_type(stored)}"]
    if own in graphs.packed:
        lines.append(f"util.global private mutable @z{index} : {_type(given)}")
    return "\n".join(lines)


def _initializer(graphs: Graphs) -> str:
    places = [graphs.parameters.index(own) for own in graphs.packed]
    types = [_type(graphs.dialect.as_given(own)) for own in graphs.packed]
    results = [_type(graphs.given[index]) for index in places]
    lines = ["util.initializer {"]
    lines += [
        f"  %p{i} = util.global.load @p{i} : {kind}" for i, kind in zip(places, types, strict=True)
    ]
    values = ", ".join(f"%p{i}" for i in places)
    signature = f"({', '.join(types)}) -> ({', '.join(results)})"
    lines.append(f"  %r:{len(places)} = func.call @{PREPARE}_graph({values}) : {signature}")
    for at, (index, kind) in enumerate(zip(places, results, strict=True)):
        lines.append(f"  util.global.store %r#{at}, @z{index} : {kind}")
    return "\n".join([*lines, "  util.return", "}"])


def _function(kind: Kind, graphs: Graphs, states: Sequence[str]) -> str:
    inputs = [_tensor((n,), "int32") for n in (kind.tokens, 1)]
    rows = 1 if kind.last_only else kind.tokens
    logits = _tensor((rows, graphs.program.config.vocab_size), "float32")
    lines = [f"func.func @{kind.name}(%tokens: {inputs[0]}, %start: {inputs[1]}) -> {logits} {{"]
    given, types = ["%tokens", "%start"], [*inputs]

    def load(name: str, held: str) -> None:
        lines.append(f"  %{name} = util.global.load @{name} : {held}")
        given.append(f"%{name}")
        types.append(held)

    for index, held in enumerate(states):
        load(f"s{index}", held)
    for index, own in enumerate(graphs.parameters):
        load(f"{'z' if own in graphs.packed else 'p'}{index}", _type(graphs.given[index]))
    results = f"({', '.join([logits, *states])})"
    call = f"func.call @{kind.name}_graph({', '.join(given)}) : ({', '.join(types)}) -> {results}"
    lines.append(f"  %r:{1 + len(states)} = {call}")
    for index, held in enumerate(states):
        lines.append(f"  util.global.store %r#{index + 1}, @s{index} : {held}")
    return "\n".join([*lines, f"  return %r#0 : {logits}", "}"])


def _reset(states: Sequence[str]) -> str:
    """Zeros for every state, when a module is loaded and when it is asked for. IREE gives equal
    constants one buffer, and a state that is written in place would write others with it: behind
    barriers these are not known to be equal."""
    lines = []
    for index, held in enumerate(states):
        lines += [
            f"  %c{index} = arith.constant 0.0 : f32",
            f"  %z{index} = util.optimization_barrier %c{index} : f32",
            f"  %s{index} = flow.tensor.splat %z{index} : {held}",
            f"  util.global.store %s{index}, @s{index} : {held}",
        ]
    body = "\n".join(lines)
    loaded = f"util.initializer {{\n{body}\n  util.return\n}}"
    return f"{loaded}\nfunc.func @{RESET}() {{\n{body}\n  return\n}}"
