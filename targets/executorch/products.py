"""Parity of every n-bit product of a program, extracted from the file and run on its own.

The nodes, numbers and constants are the file's. Only the input and the output of a product become
those of a small program. int8 represents the inputs exactly, whatever the order of the rounding
arithmetic, so that only the product itself can differ.
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
from torch import Tensor, fx

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung, compare_logits, operators_rung
from lfmc.reference.operators import read_matrix
from lfmc.targets.executorch.activations import round_rows
from lfmc.targets.executorch.assemble import assemble
from lfmc.targets.executorch.delegate import Bytes, Delegate
from lfmc.targets.executorch.library import load_operators, mute
from lfmc.targets.executorch.steps import Input, Value, XnnpackStep, byte_view
from lfmc.targets.executorch.stored import MODEL, ProgramConstants, hash_bytes, read_constants

TITLE = "every n-bit product of the artifact, alone, on rows exact in int8"
# The order of float32 sums may differ.
TOLERANCE = 1e-5

Key = tuple[str, str]  # of a matrix: hashes of its codes and scales as stored in the file
UNKNOWN = "a product that the plan does not have"


@dataclass(frozen=True)
class Product:
    """A product of one of the file's delegates: its node, its two operands, and the keys of all
    constants of the delegate."""

    node: xnn.XNNFullyConnected
    rounded: xnn.XNNQuantizedTensorValue
    weight: xnn.XNNQuantizedTensorValue
    keys: Sequence[str]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.tensor_value.dims
        return rows, columns

    def constants(self, constants: ProgramConstants) -> tuple[Bytes, Bytes]:
        """Return the bytes of the codes and of the scales."""
        params: Any = self.weight.quant_params
        codes_key = self.keys[self.weight.tensor_value.constant_buffer_idx]
        scales_key = self.keys[params.scale_buffer_idx]
        return constants.named[codes_key], constants.named[scales_key]


def products_rung(program: Program, folder: Path) -> Rung:
    """Return the largest difference of each kind of product; `program` is bound.

    The difference is infinite for a product that only the program or only the file contains.
    """
    return operators_rung(TITLE, TOLERANCE, _compare_products(program, folder))


def _compare_products(program: Program, folder: Path) -> Iterator[CaseResult]:
    constants = read_constants(folder / MODEL)
    planned, compared = dict(_planned_matrices(program)), set[Key]()
    for payload in constants.delegates:
        products = list(_products(payload))
        if not products:
            continue
        inputs = [_rows(product.shape[1]) for product in products]
        results = _run(products, constants, inputs)
        for product, x, actual in zip(products, inputs, results, strict=True):
            key = _key(*product.constants(constants))
            if key not in planned:
                yield CaseResult(UNKNOWN, torch.inf, 0.0)
                continue
            kind, weight = planned[key]
            compared.add(key)
            yield compare_logits(kind, actual, round_rows(x) @ weight().T)
    for key in planned.keys() - compared:
        yield CaseResult(planned[key][0], torch.inf, 0.0)


def _key(codes: Bytes, scales: Bytes) -> Key:
    return hash_bytes(codes), hash_bytes(scales)


def _planned_matrices(program: Program) -> Iterator[tuple[Key, tuple[str, Callable[[], Tensor]]]]:
    """Yield the key of every n-bit matrix of the bound program, its title, and a function that
    returns its float32 values `[N, K]`."""
    for kind, name in (("linear", "lfm.linear_nbits"), ("expert", "lfm.dequantize")):
        for node in program.nodes(name):
            matrix = read_matrix(program, node)
            codes = matrix.codes ^ 0x80 if matrix.bits == 8 else matrix.codes
            key = _key(byte_view(codes), byte_view(matrix.scales))
            scales_title = "one scale per row" if matrix.bits == 8 else f"groups of {matrix.group}"
            title = f"{kind}, {matrix.bits} bits, {scales_title}"
            yield key, (title, partial(_dequantized, program, node))


def _dequantized(program: Program, node: fx.Node) -> Tensor:
    return read_matrix(program, node).floats


def _products(payload: bytes) -> Iterator[Product]:
    """Yield the n-bit products of a delegate."""
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
    """Return inputs float32 `[1, T, K]` that int8 represents exactly.

    A row is a factor times integers in a range of 256, which is -128 to 127 plus an offset, so that
    scales and zero points differ. Each row contains both ends of its range.
    """
    generator = torch.Generator().manual_seed(columns)
    rows = []
    for offset, factor in ((0, 1.0), (100, 0.37), (-60, 3e-3), (128, 25.0)):
        row = torch.randint(-128, 128, (columns,), generator=generator)
        row[torch.randperm(columns, generator=generator)[:2]] = torch.tensor([-128, 127])
        rows.append((row + offset).float() * factor)
    return torch.stack(rows).unsqueeze(0)


def _run(
    products: Sequence[Product], constants: ProgramConstants, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Run the products of one delegate in the runtime; return their results."""
    from executorch.runtime import Runtime

    pairs = [
        (Input(tuple(x.shape)), Value((1, x.shape[1], product.shape[0])))
        for product, x in zip(products, inputs, strict=True)
    ]
    steps = [
        XnnpackStep((x,), (y,), partial(_emit, product, constants, x, y), 0)
        for product, (x, y) in zip(products, pairs, strict=True)
    ]
    x_values, y_values = zip(*pairs, strict=True)
    data = assemble(steps, x_values, y_values, {}).to_bytes()
    load_operators()
    with mute():
        # The runtime reads `data` while the method runs, and does not keep a reference to it.
        method = Runtime.get().load_program(data).load_method("forward")
        assert method is not None
        return [result.clone() for result in method.execute(list(inputs))]


def _emit(
    product: Product, constants: ProgramConstants, x: Value, y: Value, delegate: Delegate
) -> None:
    """Add the file's node and values to a delegate, with input `x` and output `y`."""
    rounded_id = delegate.copy_value(product.rounded, [])
    delegate.add_node(xnn.XNNConvert(delegate.float_id(x), rounded_id, 0))
    weight_id = delegate.copy_value(product.weight, product.constants(constants))
    node = replace(
        product.node,
        input1_id=rounded_id,
        filter_id=weight_id,
        bias_id=XNN_INVALID_VALUE_ID,
        output_id=delegate.float_id(y),
    )
    delegate.add_node(node)
