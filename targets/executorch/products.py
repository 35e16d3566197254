"""Every n-bit product of a program, cut out of the file and run by the runtime on its own.

Its nodes, numbers and constants are the file's; only the values on both sides of it become those
of a small program. Inputs are such that rounding them to int8 is exact, whatever order it is
computed in, so that nothing but the product itself can differ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    XNNHeader,
    _get_schema_bytes,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID
from executorch.exir._serialize._dataclass import _json_to_dataclass
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung, difference, operators_rung
from lfmc.targets.executorch.activations import round_rows
from lfmc.targets.executorch.assemble import assemble
from lfmc.targets.executorch.delegate import Delegate
from lfmc.targets.executorch.library import load_operators, mute
from lfmc.targets.executorch.steps import Given, Inside, Value, as_bytes
from lfmc.targets.executorch.stored import MODEL, Constants, constants, hash_of

TITLE = "every n-bit product of the artifact, alone, on rows that int8 has exactly"
# Sums of float32 in another order.
TOLERANCE = 1e-5

Key = tuple[str, str]  # of a matrix: hashes of its codes and scales in the form of a file
UNKNOWN = "a product that the plan does not have"


@dataclass(frozen=True)
class Product:
    """A product as a delegate of the file has it: its node, its two sides, and where the bytes of
    every constant of the delegate are found."""

    node: xnn.XNNFullyConnected
    rounded: xnn.XNNQuantizedTensorValue
    weight: xnn.XNNQuantizedTensorValue
    keys: Sequence[str]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.tensor_value.dims
        return rows, columns

    def constants(self, held: Constants) -> tuple[bytes, bytes]:
        """Codes and scales."""
        steps: Any = self.weight.quant_params
        codes = self.keys[self.weight.tensor_value.constant_buffer_idx]
        return held.named[codes], held.named[self.keys[steps.scale_buffer_idx]]


def products_rung(program: Program, folder: Path) -> Rung:
    """The worst of each kind; `program` is bound. A product of the program that the file does not
    have, or the other way round, counts as infinitely far."""
    return operators_rung(TITLE, TOLERANCE, _results(program, folder))


def _results(program: Program, folder: Path) -> Iterator[CaseResult]:
    held = constants(folder / MODEL)
    wanted, seen = dict(_wanted(program)), set[Key]()
    for payload in held.delegates:
        products = list(_products(payload))
        if not products:
            continue
        inputs = [_rows(product.shape[1]) for product in products]
        for product, x, found in zip(products, inputs, _run(products, held, inputs), strict=True):
            key = _key(*product.constants(held))
            if key not in wanted:
                yield CaseResult(UNKNOWN, torch.inf, 0.0)
                continue
            kind, weight = wanted[key]
            seen.add(key)
            yield difference(kind, found, round_rows(x) @ weight().T)
    for key in wanted.keys() - seen:
        yield CaseResult(wanted[key][0], torch.inf, 0.0)


def _key(codes: bytes, scales: bytes) -> Key:
    return hash_of(codes), hash_of(scales)


def _wanted(program: Program) -> Iterator[tuple[Key, tuple[str, Callable[[], Tensor]]]]:
    """The n-bit matrices of the bound program, by their bytes as a file has them: what they are,
    and their float32 values `[N, K]`."""
    attributes = dict(program.module.named_buffers())
    for kind, name in (("linear", "lfm.linear_nbits"), ("expert", "lfm.dequantize")):
        for node in program.nodes(name):
            args = node.args[1:] if kind == "linear" else node.args
            codes, scales = (attributes[str(arg.target)] for arg in args[:2])  # type: ignore[union-attr]
            bits, group, columns = args[-3:]
            whole = (codes, scales, None, bits, group, columns)
            form = codes ^ 0x80 if bits == 8 else codes
            key = _key(as_bytes(form), as_bytes(scales))
            span = "a scale a row" if bits == 8 else f"groups of {group}"
            title = f"{kind}, {bits} bits, {span}"
            yield key, (title, partial(torch.ops.lfm.dequantize.default, *whole))


def _products(payload: bytes) -> Iterator[Product]:
    """The n-bit products of a delegate."""
    graph = _graph(payload)
    values = [value.xvalue_union for value in graph.xvalues]
    keys = [data.named_key for data in graph.constant_data]
    quantized = xnn.XNNQuantizedTensorValue
    for node in (node.xnode_union for node in graph.xnodes):
        if isinstance(node, xnn.XNNFullyConnected) and isinstance(
            values[node.filter_id], quantized
        ):
            yield Product(node, values[node.input1_id], values[node.filter_id], keys)


def _graph(payload: bytes) -> xnn.XNNGraph:
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "graph.fbs").write_bytes(_get_schema_bytes())
        (folder / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
        _flatc_decompile(name, str(folder / "graph.fbs"), str(folder / "graph.bin"))
        return _json_to_dataclass(json.loads((folder / "graph.json").read_bytes()), xnn.XNNGraph)


def _rows(columns: int) -> Tensor:
    """Float32 `[1, T, K]`: whole numbers times a factor, from -128 to 127 or moved from there, so
    that scales and zero points differ; each row has both ends of its range."""
    generator = torch.Generator().manual_seed(columns)
    rows = []
    for move, factor in ((0, 1.0), (100, 0.37), (-60, 3e-3), (128, 25.0)):
        row = torch.randint(-128, 128, (columns,), generator=generator)
        row[torch.randperm(columns, generator=generator)[:2]] = torch.tensor([-128, 127])
        rows.append((row + move).float() * factor)
    return torch.stack(rows).unsqueeze(0)


def _run(products: Sequence[Product], held: Constants, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of products of one delegate, by the runtime."""
    from executorch.runtime import Runtime

    sides = [
        (Given(tuple(x.shape)), Value((1, x.shape[1], p.shape[0])))
        for p, x in zip(products, inputs, strict=True)
    ]
    steps = [
        Inside((x,), (y,), partial(_emit, product, held, x, y), 0)
        for product, (x, y) in zip(products, sides, strict=True)
    ]
    given, results = zip(*sides, strict=True)
    program = assemble(steps, given, results, {})
    load_operators()
    with mute():
        method = Runtime.get().load_program(program.data).load_method("forward")
        assert method is not None
        return [found.clone() for found in method.execute(list(inputs))]


def _emit(product: Product, held: Constants, x: Value, y: Value, delegate: Delegate) -> None:
    """The file's own node and values, between `x` and `y`."""
    rounded = delegate.copy(product.rounded, [])
    delegate.node(xnn.XNNConvert(delegate.id(x), rounded, 0))
    weight = delegate.copy(product.weight, product.constants(held))
    node = replace(
        product.node,
        input1_id=rounded,
        filter_id=weight,
        bias_id=XNN_INVALID_VALUE_ID,
        output_id=delegate.id(y),
    )
    delegate.node(node)
