"""The constants of a package: written once, shared by its functions, read back by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types
from torch import Tensor

from lfmc.calib_free.pack import PackedTensor
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.coreml.names import identifier


@dataclass
class Constants:
    """Arrays by their name in the file, and which of them are the checkpoint's.

    A constant that two functions ask for is one array, and one entry of the weight file: entries
    are shared by `weight_id`, which coremltools has for that.
    """

    stored: list[StoredTensor] = field(default_factory=list)
    _arrays: dict[str, Any] = field(default_factory=dict)

    def values(
        self, name: str, sources: tuple[str, ...], value: Tensor, order: Arrangement = "rows"
    ) -> Var:
        """A tensor of the checkpoint that stays float, in the dtype that the plan stores."""
        return self._write(name, "values", sources, order, value.numpy(), value.nbytes)

    def matrix(
        self, name: str, sources: tuple[str, ...], pieces: list[PackedTensor], order: Arrangement
    ) -> Var:
        """A float16 matrix, compressed in the file: `(data - offset) * scale`, or a palette.

        With "rows" it is one piece, with "experts" pieces `[E, N, K]`. Codes of a symmetric format
        are stored signed, with no offset; those of a palette pick from its row's table.
        """
        number_format = pieces[0].format
        bits, palette = number_format.bits, number_format.palette
        signed = number_format.symmetric and not palette
        kind = _numpy_type(f"{'int' if signed else 'uint'}{bits}")
        shift = number_format.zero_point if signed else 0

        def write(part: str, tensors: list[Tensor], dtype: Any, width: int) -> Var:
            joined = tensors[0] if order == "rows" else torch.stack(tensors)
            array = joined.numpy().astype(dtype)
            full = f"{name}.{part}"
            return self._write(full, part, sources, order, array, -(-array.size * width // 8))

        codes = [piece.codes.short() - shift for piece in pieces]
        if palette:
            tables = [piece.scales[:, None, :, None] for piece in pieces]  # (N, 1, 2^bits, 1)
            return mb.constexpr_lut_to_dense(
                indices=write("codes", codes, kind, bits),
                lut=write("scales", tables, np.float16, 16),
                name=identifier(name),
            )
        given = {
            "data": write("codes", codes, kind, bits),
            "scale": write("scales", [piece.scales for piece in pieces], np.float16, 16),
        }
        zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
        if zeros:
            given["offset"] = write("zeros", zeros, kind, bits)
        return mb.constexpr_blockwise_shift_scale(**given, name=identifier(name))

    def table(self, name: str, value: Tensor) -> Var:
        """A constant that is not of the checkpoint."""
        return self._shared(name, value.numpy())

    def _write(
        self,
        name: str,
        part: str,
        sources: tuple[str, ...],
        order: Arrangement,
        array: Any,
        nbytes: int,
    ) -> Var:
        if identifier(name) not in self._arrays:
            self.stored.append(StoredTensor(name, part, sources, order, nbytes))
        return self._shared(name, array)

    def _shared(self, name: str, array: Any) -> Var:
        full = identifier(name)
        array = self._arrays.setdefault(full, array)
        var = mb.const(val=array, name=full)
        var.op.weight_id = full
        return var


def _numpy_type(kind: str) -> Any:
    """numpy's dtype for an integer of less than a byte, with the true one as metadata."""
    return types.nptype_from_builtin(types.string_to_builtin(kind))
