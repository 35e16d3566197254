"""The constants of a package: functions share them, and parity reads them back by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.machine.mapped import map_array
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.coreml.names import identifier


@dataclass
class Constants:
    """Arrays by their name in the file; `stored` lists the arrays of the checkpoint.

    Functions that use the same constant share one array and one entry of the weight file, by the
    `weight_id` of coremltools. Large arrays are mapped from files in `scratch`, because coremltools
    writes the weight file only after all functions are built.
    """

    scratch: Path
    stored: list[StoredTensor] = field(default_factory=list)
    _arrays: dict[str, Any] = field(default_factory=dict)
    _matrices: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def names(self) -> Collection[str]:
        """The names of all constants in the file."""
        return self._arrays.keys()

    def values(
        self, name: str, sources: tuple[str, ...], value: Callable[[], Tensor], order: Arrangement
    ) -> Var:
        """Return a tensor of the checkpoint that stays float, in the dtype of the plan.

        `value` is called for the first function only.
        """
        if identifier(name) not in self._arrays:
            tensor = value()
            self._store(name, "values", sources, order, tensor.numpy(), tensor.nbytes)
        return self._const(name)

    def matrix(
        self,
        name: str,
        sources: tuple[str, ...],
        pieces: Callable[[], list[PackedTensor]],
        order: Arrangement,
    ) -> Var:
        """Return a float16 matrix, compressed in the file: `(data - offset) * scale`, or a palette.

        `pieces` is called for the first function only. It returns one piece for the order "rows",
        and E pieces of `[E, N, K]` for "experts". The codes of a symmetric format are stored
        signed, without offset. The codes of a palette index the table of their row.
        """
        if name not in self._matrices:
            self._matrices[name] = self._encode(name, sources, pieces(), order)
        inputs = {key: self._const(part) for key, part in self._matrices[name].items()}
        palette = "lut" in inputs
        make = mb.constexpr_lut_to_dense if palette else mb.constexpr_blockwise_shift_scale
        return make(**inputs, name=identifier(name))

    def table(self, name: str, value: Tensor) -> Var:
        """Return a constant that is not a tensor of the checkpoint."""
        self._arrays.setdefault(identifier(name), value.numpy())
        return self._const(name)

    def _encode(
        self, name: str, sources: tuple[str, ...], pieces: list[PackedTensor], order: Arrangement
    ) -> dict[str, str]:
        """Store the parts of a matrix, and return their names by the operator's inputs."""
        number_format = pieces[0].format
        bits, palette = number_format.bits, number_format.palette
        signed = number_format.symmetric and not palette
        kind = _numpy_type(f"{'int' if signed else 'uint'}{bits}")
        shift = number_format.zero_point if signed else 0

        def store(part: str, tensors: list[Tensor], dtype: Any, width: int) -> str:
            joined = tensors[0] if order == "rows" else torch.stack(tensors)
            array = joined.numpy().astype(dtype)
            full_name = f"{name}.{part}"
            self._store(full_name, part, sources, order, array, -(-array.size * width // 8))
            return full_name

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
        self._arrays[identifier(name)] = map_array(array, self.scratch)
        self.stored.append(StoredTensor(name, part, sources, order, nbytes))

    def _const(self, name: str) -> Var:
        full_name = identifier(name)
        var = mb.const(val=self._arrays[full_name], name=full_name)
        var.op.weight_id = full_name
        return var


def _numpy_type(kind: str) -> Any:
    """Return numpy's dtype for an integer of less than a byte, with the true type as metadata."""
    return types.nptype_from_builtin(types.string_to_builtin(kind))
