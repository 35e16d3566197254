"""Matrices in pieces of a limited number of rows.

The Neural Engine was reported to take no dim above 16,384
(https://github.com/apple/coremltools/issues/1003); an embedding and its head have 65,536 rows.
Pieces are constants of their own, and a tied matrix is
still stored once: the head multiplies by every piece, the embedding looks into every piece and
keeps what lies in it.
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
    """Rows `[1, T, K]`, float16, of a matrix for `ids` `[1, T]`."""
    if len(pieces) == 1:
        return cast(mb.gather(x=pieces[0], indices=ids, axis=0, name=name), HALF)
    limit, total = np.int32(pieces[0].shape[0]), None
    which, place = mb.floor_div(x=ids, y=limit), mb.mod(x=ids, y=limit)
    for own, piece in zip(np.eye(len(pieces), dtype=np.float16), pieces, strict=True):
        inside = mb.expand_dims(x=mb.gather(x=own, indices=which, axis=0), axes=[-1])
        near = mb.mod(x=place, y=np.int32(piece.shape[0]))  # the last piece is shorter
        rows = mb.mul(x=cast(mb.gather(x=piece, indices=near, axis=0), HALF), y=inside)
        total = rows if total is None else mb.add(x=total, y=rows)
    return mb.identity(x=total, name=name)


def product(low: Lowering, pieces: Sequence[Var], x: Var, bias: fx.Node | None, name: str) -> Var:
    """`x` `[..., K]` times a matrix, plus a bias `[N]` where there is one: `[..., N]`."""
    if len(pieces) == 1:
        return mb.linear(x=x, weight=pieces[0], bias=_bias(low, pieces[0], bias, 0), name=name)
    found, start = [], 0
    for piece in pieces:
        found.append(mb.linear(x=x, weight=piece, bias=_bias(low, piece, bias, start)))
        start += piece.shape[0]
    return mb.concat(values=found, axis=-1, name=name)


def _bias(low: Lowering, piece: Var, bias: fx.Node | None, start: int) -> Var:
    """The part of a bias that is a piece's, or zeros that all pieces of this size share: without
    any, coremltools would write them for each."""
    rows = piece.shape[0]
    if bias is None:
        return low.zeros(rows, piece.dtype)
    whole = low.value(bias, piece.dtype)
    if whole.shape[0] == rows:
        return whole
    return mb.slice_by_size(x=whole, begin=[start], size=[rows])
