"""Lookup of embedding rows from the codes and scales that XNNPACK stores.

A tied head multiplies by the same constants, so the file stores them once. The runtime's own
lookups (`quantized_decomposed::embedding_4bit`) can't read them: the two codes of a byte would be
in the other order, and the scales float16 or float32.
"""

from __future__ import annotations

import torch
from torch import fx

from lfmc.passes.pattern import arguments
from lfmc.targets.executorch.lower import Lowering
from lfmc.targets.executorch.steps import Constant, Value, constant

# The two values of each byte of 4-bit codes, the lower half first: float32 `[256, 2]`.
BYTE_VALUES = torch.tensor([[byte % 16 - 8.0, byte // 16 - 8.0] for byte in range(256)])


def embedding(m: Lowering, node: fx.Node) -> Value:
    table, ids = arguments(node)[:2]
    return _rows(m, m.floats(table), m.value(ids))


def embedding_nbits(m: Lowering, node: fx.Node) -> Value:
    """Multiply the codes of each token's row by their scales."""
    ids, codes, *_ = arguments(node)
    matrix, ids_value, recorder = m.matrix(codes), m.value(ids), m.recorder
    values = _rows(m, constant(matrix.codes), ids_value)
    if matrix.bits == 4:
        values = _rows(m, constant(BYTE_VALUES), _convert(m, values, torch.int64))
    else:
        values = _convert(m, values, torch.float32)
    scales = _rows(m, constant(matrix.scales), ids_value)
    if scales.dtype != torch.float32:
        scales = _convert(m, scales, torch.float32)
    columns = matrix.shape[1]
    groups = columns // matrix.group
    products = recorder.multiply(
        recorder.reshape(values, (1, m.length, groups, matrix.group)),
        recorder.reshape(scales, (1, m.length, groups, 1)),
    )
    return recorder.reshape(products, (1, m.length, columns))


def _rows(m: Lowering, table: Constant, indices: Value) -> Value:
    """Return the table's row for each index."""
    shape = (*indices.shape, table.data.shape[1])
    return m.call("aten::embedding.out", (table, indices, -1, False, False), shape, table.dtype)


def _convert(m: Lowering, value: Value, dtype: torch.dtype) -> Value:
    return m.call("aten::_to_copy.out", (value, False, None), value.shape, dtype)
