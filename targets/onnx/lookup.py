"""The lookup of rows in an n-bit table, with standard operators only.

`GatherBlockQuantized` is not in the WebAssembly build of ONNX Runtime that transformers.js loads,
and its WebGPU kernel expects zero points without padding at the end of a row. These nodes compute
the same float32 values, `(code - zero) * scale`, with the same roundings:

    packed = Gather(codes, ids)                                       # (B, T, bytes) uint8
    above_k = floor(packed / 2^(k * bits))                            # (B, T, bytes, 8 / bits)
    code_k = above_k - 2^bits * floor(above_k / 2^bits)
    row = (reshape(code, (B, T, G, group)) - zero) * scale            # zero, scale: (B, T, G, 1)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lfmc.targets.onnx.emitter import Emitter


def lookup(
    emitter: Emitter,
    ids: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    bits: int,
    group: int,
    groups: int,
) -> ir.Value:
    """Return the rows `ids` `[B, T]` of a table as float32 `[B, T, groups * group]`.

    `codes` is `[N, bytes]`, `scales` `[N, groups]` and `zeros` `[N, bytes]`; the codes of a row
    fill its bytes, and its zero points may end with padding.
    """
    packed = emitter.op("Gather", codes, ids, axis=0)
    row = _unpack(emitter, packed, bits)
    row = emitter.op("Reshape", row, emitter.ints(0, 0, groups, group))
    if zeros is None:
        zero = emitter.number(2.0 ** (bits - 1))
    else:
        zero = _unpack(emitter, emitter.op("Gather", zeros, ids, axis=0), bits)
        zero = emitter.op("Reshape", zero, emitter.ints(0, 0, -1, 1))
        if groups * bits % 8:
            ends = (emitter.ints(0), emitter.ints(groups), emitter.ints(2))
            zero = emitter.op("Slice", zero, *ends)
    scale = emitter.op("Unsqueeze", emitter.op("Gather", scales, ids, axis=0), emitter.ints(3))
    row = emitter.op("Mul", emitter.op("Sub", row, zero), scale)
    return emitter.op("Reshape", row, emitter.ints(0, 0, groups * group))


def _unpack(emitter: Emitter, packed: ir.Value, bits: int) -> ir.Value:
    """Return the codes of bytes `[B, T, bytes]`, low bits first, as float32.

    The result is `[B, T, bytes, 8 / bits]`.
    """
    whole = emitter.op("Cast", packed, to=int(ir.DataType.FLOAT))
    whole = emitter.op("Unsqueeze", whole, emitter.ints(3))
    if bits == 8:
        return whole
    shifts = np.exp2(-bits * np.arange(8 // bits)).astype(np.float32)
    above = emitter.op("Floor", emitter.op("Mul", whole, emitter.constant(shifts)))
    higher = emitter.op("Floor", emitter.op("Mul", above, emitter.number(2.0**-bits)))
    return emitter.op("Sub", above, emitter.op("Mul", higher, emitter.number(2.0**bits)))
