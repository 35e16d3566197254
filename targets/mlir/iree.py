"""A module for IREE: parameters become its own, mapped from a file, and it is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import iree.compiler.tools as compiler

from lfmc.errors import UnsupportedError
from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.graphs import PREPARE, Graphs, Kind, state_shape
from lfmc.targets.parameters import Parameter

SCOPE = "model"  # of the parameters, for the runtime
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
)


def with_parameters(module: Any, graphs: Graphs) -> str:
    """The module's text, with functions of tokens and states only around the graphs'."""
    text = str(module).replace("xui8>", "xi8>")  # linalg's operators say what is unsigned
    for name in [*(kind.name for kind in graphs.kinds), PREPARE]:
        text = text.replace(f"func.func @{name}(", f"func.func private @{name}_graph(")
    parts = [_global(index, own, graphs) for index, own in enumerate(graphs.parameters)]
    if graphs.packed:
        parts.append(_initializer(graphs))
    parts += [_function(kind, graphs) for kind in graphs.kinds]
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


def _global(index: int, own: Parameter, graphs: Graphs) -> str:
    held = f'util.global private @p{index} = #flow.parameter.named<"{SCOPE}"::"{own.name}">'
    lines = [f"{held} : {_type(own)}"]
    if own in graphs.packed:
        lines.append(f"util.global private mutable @z{index} : {_type(graphs.given[index])}")
    return "\n".join(lines)


def _initializer(graphs: Graphs) -> str:
    places = [graphs.parameters.index(own) for own in graphs.packed]
    types = [_type(own) for own in graphs.packed]
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


def _function(kind: Kind, graphs: Graphs) -> str:
    config = graphs.program.config
    states = [_tensor(state_shape(spec), "float32") for spec in graphs.program.states]
    inputs = [_tensor((n,), "int32") for n in (kind.tokens, 1)] + states
    rows = 1 if kind.last_only else kind.tokens
    results = [_tensor((rows, config.vocab_size), "float32"), *states]
    names = [f"%a{index}" for index in range(len(inputs))]
    given = ", ".join(f"{name}: {kind}" for name, kind in zip(names, inputs, strict=True))
    lines = [f"func.func @{kind.name}({given}) -> ({', '.join(results)}) {{"]
    types = []
    for index, own in enumerate(graphs.parameters):
        held = "z" if own in graphs.packed else "p"
        types.append(_type(graphs.given[index]))
        lines.append(f"  %{held}{index} = util.global.load @{held}{index} : {types[-1]}")
        names.append(f"%{held}{index}")
    signature = f"({', '.join([*inputs, *types])}) -> ({', '.join(results)})"
    call = f"func.call @{kind.name}_graph({', '.join(names)}) : {signature}"
    lines.append(f"  %r:{len(results)} = {call}")
    values = ", ".join(f"%r#{index}" for index in range(len(results)))
    return "\n".join([*lines, f"  return {values} : {', '.join(results)}", "}"])
