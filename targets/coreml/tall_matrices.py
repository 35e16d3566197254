"""Products and lookups with matrices that are split into pieces of their rows.

The Neural Engine was reported to support no dim above 16,384
(https://github.com/apple/coremltools/issues/1003); an embedding and its head have 65,536 rows.
Every piece is a separate constant, and a tied matrix is still stored once. The head multiplies by
every piece. The embedding gathers from every piece and masks out ids that are not in the piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var
from torch import fx

from lfmc.targets.coreml.dtypes import HALF, cast
from lfmc.targets.coreml.lower import Lowering


def lookup(pieces: Sequence[Var], ids: Var, name: str) -> Var:
    """Return the rows `[1, T, K]`, float16, of a matrix for `ids` `[1, T]`."""
    if len(pieces) == 1:
        return cast(mb.gather(x=pieces[0], indices=ids, axis=0, name=name), HALF)
    limit, total = np.int32(pieces[0].shape[0]), None
    piece_index, row = mb.floor_div(x=ids, y=limit), mb.mod(x=ids, y=limit)
    for one_hot, piece in zip(np.eye(len(pieces), dtype=np.float16), pieces, strict=True):
        mask = mb.expand_dims(x=mb.gather(x=one_hot, indices=piece_index, axis=0), axes=[-1])
        valid_row = mb.mod(x=row, y=np.int32(piece.shape[0]))  # the last piece is shorter
        rows = mb.mul(x=cast(mb.gather(x=piece, indices=valid_row, axis=0), HALF), y=mask)
        total = rows if total is None else mb.add(x=total, y=rows)
    return mb.identity(x=total, name=name)


def product(
    lowering: Lowering, pieces: Sequence[Var], x: Var, bias: fx.Node | None, name: str
) -> Var:
    """Return `x` `[..., K]` times a matrix, plus a bias `[N]` if there is one: `[..., N]`."""
    if len(pieces) == 1:
        return mb.linear(x=x, weight=pieces[0], bias=_bias(lowering, pieces[0], bias, 0), name=name)
    parts, start = [], 0
    for piece in pieces:
        parts.append(mb.linear(x=x, weight=piece, bias=_bias(lowering, piece, bias, start)))
        start += piece.shape[0]
    return mb.concat(values=parts, axis=-1, name=name)


def _bias(lowering: Lowering, piece: Var, bias: fx.Node | None, start: int) -> Var:
    """Return the part of a bias for a piece, or zeros that all pieces of this size share.

    Without a bias argument, coremltools would write zeros for each piece.
    """
    rows = piece.shape[0]
    if bias is None:
        return lowering.zeros(rows, piece.dtype)
    full_bias = lowering.value(bias, piece.dtype)
    if full_bias.shape[0] == rows:
        return full_bias
    return mb.slice_by_size(x=full_bias, begin=[start], size=[rows])
