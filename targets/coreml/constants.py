"""The constants of a package: written once, shared by its functions, read back by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import PackedTensor
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
    _matrices: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def names(self) -> Collection[str]:
        """Of all constants, in the file."""
        return self._arrays.keys()

    def values(
        self, name: str, sources: tuple[str, ...], value: Callable[[], Tensor], order: Arrangement
    ) -> Var:
        """A tensor of the checkpoint that stays float, in the dtype that the plan stores.

        `value` is called for the first function only.
        """
        if identifier(name) not in self._arrays:
            made = value()
            self._store(name, "values", sources, order, made.numpy(), made.nbytes)
        return self._const(name)

    def matrix(
        self,
        name: str,
        sources: tuple[str, ...],
        pieces: Callable[[], list[PackedTensor]],
        order: Arrangement,
    ) -> Var:
        """A float16 matrix, compressed in the file: `(data - offset) * scale`, or a palette.

        `pieces` is called for the first function only. With "rows" it gives one, with "experts"
        those of `[E, N, K]`. Codes of a symmetric format are stored signed, with no offset; those
        of a palette pick from its row's table.
        """
        if name not in self._matrices:
            self._matrices[name] = self._encode(name, sources, pieces(), order)
        inputs = {key: self._const(part) for key, part in self._matrices[name].items()}
        palette = "lut" in inputs
        make = mb.constexpr_lut_to_dense if palette else mb.constexpr_blockwise_shift_scale
        return make(**inputs, name=identifier(name))

    def table(self, name: str, value: Tensor) -> Var:
        """A constant that is not of the checkpoint."""
        self._arrays.setdefault(identifier(name), value.numpy())
        return self._const(name)

    def _encode(
        self, name: str, sources: tuple[str, ...], pieces: list[PackedTensor], order: Arrangement
    ) -> dict[str, str]:
        """Store the parts of a matrix; the operator's inputs, and the names of what they get."""
        number_format = pieces[0].format
        bits, palette = number_format.bits, number_format.palette
        signed = number_format.symmetric and not palette
        kind = _numpy_type(f"{'int' if signed else 'uint'}{bits}")
        shift = number_format.zero_point if signed else 0

        def store(part: str, tensors: list[Tensor], dtype: Any, width: int) -> str:
            joined = tensors[0] if order == "rows" else torch.stack(tensors)
            array = joined.numpy().astype(dtype)
            full = f"{name}.{part}"
            self._store(full, part, sources, order, array, -(-array.size * width // 8))
            return full

        codes = store("codes", [piece.codes.short() - shift for piece in pieces], kind, bits)
        scales = [piece.scales for piece in pieces]
        if palette:
            tables = [table[:, None, :, None] for table in scales]  # (N, 1, 2^bits, 1)
            return {"indices": codes, "lut": store("scales", tables, np.float16, 16)}
        inputs = {"data": codes, "scale": store("scales", scales, np.float16, 16)}
        zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
        if zeros:
            inputs["offset"] = store("zeros", zeros, kind, bits)
        return inputs

    def _store(
        self,
        name: str,
        part: str,
        sources: tuple[str, ...],
        order: Arrangement,
        array: Any,
        nbytes: int,
    ) -> None:
        self._arrays[identifier(name)] = array
        self.stored.append(StoredTensor(name, part, sources, order, nbytes))

    def _const(self, name: str) -> Var:
        full = identifier(name)
        var = mb.const(val=self._arrays[full], name=full)
        var.op.weight_id = full
        return var


def _numpy_type(kind: str) -> Any:
    """numpy's dtype for an integer of less than a byte, with the true one as metadata."""
    return types.nptype_from_builtin(types.string_to_builtin(kind))
