"""Computes the values of a program's constants from a checkpoint and a bit plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format, parse_format
from lfmc.calib_free.grid.packed_tensor import PackedTensor, stack_rows
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.planned_tensors import float_tensor, quantize_tensor
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import LazyTensors
from lfmc.graph.program import Part, Weight
from lfmc.graph.stored_codes import StoredCodes, codes_key
from lfmc.model.rope import inverse_frequencies


@dataclass
class PlannedWeights:
    """Tensors of a checkpoint, quantized or kept float as the plan specifies.

    Codes are searched once and stored in `codes`, because the search is slow and lowering, reading
    back and parity use the same codes. So no weights stay in memory. `observe` receives the name of
    each tensor that a target reads.
    """

    checkpoint: Checkpoint
    plan: BitPlan
    observe: Callable[[str], None] = lambda name: None
    codes: StoredCodes = field(default_factory=StoredCodes, repr=False)

    def format(self, name: str) -> Format | Floats:
        """Return the format of a tensor in the plan."""
        return parse_format(self.plan.row(name).format)

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return the parts in which a tensor is stored."""
        number_format = self.format(name)
        if isinstance(number_format, Floats):
            return ("values",)
        return ("codes", "scales") if number_format.symmetric else ("codes", "scales", "zeros")

    def packed(self, sources: tuple[str, ...]) -> PackedTensor:
        """Return codes, scales and zeros of quantized tensors, stacked along dim 0."""
        return stack_rows([self._packed(name) for name in sources])

    def _packed(self, name: str) -> PackedTensor:
        self.observe(name)
        row = self.plan.row(name)
        key = codes_key(self.checkpoint.fingerprint, row)
        packed = self.codes.load(key, row)
        if packed is None:
            packed = quantize_tensor(self.checkpoint, self.plan, name)
            packed = self.codes.store(key, row, packed)
        return packed

    def dequantized(self, name: str) -> Tensor:
        """Return a tensor as float32, dequantized if the plan quantizes it."""
        if isinstance(self.format(name), Floats):
            return self.floats((name,)).float()
        return self._packed(name).dequantize()

    @property
    def dequantized_tensors(self) -> Mapping[str, Tensor]:
        """All tensors as float32, dequantized when they are accessed."""
        return LazyTensors(self.checkpoint.tensors, self.dequantized)

    def floats(self, sources: tuple[str, ...]) -> Tensor:
        """Return float tensors in the dtype of the plan, stacked along dim 0."""
        tensors = []
        for name in sources:
            self.observe(name)
            tensors.append(float_tensor(self.checkpoint, self.plan, name))
        return torch.cat(tensors)

    def value(self, name: str, weight: Weight) -> Tensor:
        """Return the value of a constant for `Program.bind`; floats are float32."""
        if weight.part == "constant":
            return inverse_frequencies(self.checkpoint.config, name.removeprefix("rope."))
        if weight.part == "values":
            return self.floats(weight.sources).float()
        packed = self.packed(weight.sources)
        if weight.part == "codes":
            return packed.packed_codes()
        value = packed.scales if weight.part == "scales" else packed.zeros
        if value is None:
            raise ValueError(f"'{name}' has no zero points: its format is symmetric")
        return value
