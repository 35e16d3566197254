"""The values behind a program's constants: made from a checkpoint and a plan, one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format, parse_format
from lfmc.calib_free.grid.packed_tensor import PackedTensor, stack_rows
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.planned_tensors import float_tensor, quantize_tensor
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.graph.program import Part, Weight
from lfmc.model import Decoder
from lfmc.model.rope import inverse_frequencies


@dataclass
class PlannedWeights:
    """Stored tensors as the plan says; codes are kept, up to `cache_nbytes`, so that lowering,
    reading back and parity do not search for the same ones again."""

    checkpoint: Checkpoint
    plan: BitPlan
    cache_nbytes: int = 1 << 30
    _cache: dict[str, PackedTensor] = field(default_factory=dict, repr=False)

    def format(self, name: str) -> Format | Floats:
        """How the plan stores a tensor."""
        return parse_format(self.plan.row(name).format)

    def parts(self, name: str) -> tuple[Part, ...]:
        """The pieces in which a tensor is stored."""
        stored = self.format(name)
        if isinstance(stored, Floats):
            return ("values",)
        return ("codes", "scales") if stored.symmetric else ("codes", "scales", "zeros")

    def packed(self, sources: tuple[str, ...]) -> PackedTensor:
        """Codes, scales and zeros of quantized tensors, their rows one below the other."""
        return stack_rows([self._packed(name) for name in sources])

    def _packed(self, name: str) -> PackedTensor:
        if name not in self._cache:
            made = quantize_tensor(self.checkpoint, self.plan, name)
            if sum(p.codes.nbytes for p in self._cache.values()) + made.codes.nbytes > (
                self.cache_nbytes
            ):
                self._cache.clear()
            self._cache[name] = made
        return self._cache[name]

    def dequantized(self, name: str) -> Tensor:
        """A tensor that the artifact computes with, float32."""
        if isinstance(self.format(name), Floats):
            return self.floats((name,)).float()
        return self._packed(name).dequantize()

    def decoder(self) -> Decoder:
        """The float32 decoder of what the artifact computes with."""
        return self.checkpoint.decoder({n: self.dequantized(n) for n in self.checkpoint.tensors})

    def floats(self, sources: tuple[str, ...]) -> Tensor:
        """Values of tensors that stay float, in the plan's dtype, stacked along dim 0."""
        return torch.cat([float_tensor(self.checkpoint, self.plan, name) for name in sources])

    def value(self, name: str, weight: Weight) -> Tensor:
        """The value of a program's constant, for `Program.bind`; floats as float32."""
        if weight.part == "constant":
            return inverse_frequencies(self.checkpoint.config, name.removeprefix("rope."))
        if weight.part == "values":
            return self.floats(weight.sources).float()
        packed = self.packed(weight.sources)
        parts = {"codes": packed.packed_codes(), "scales": packed.scales, "zeros": packed.zeros}
        value = parts[weight.part]
        if value is None:
            raise ValueError(f"'{name}' asks for zero points of a symmetric format")
        return value
