"""Builds programs from small torch modules, and checks passes on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.graph.program import Program, Weight
from lfmc.graph.trace import lift_constants
from lfmc.model import read_config
from lfmc.passes.base import Pass, apply
from lfmc.passes.remove_no_ops import RemoveNoOps
from tests.factories import KINDS


def program_of(module: nn.Module, *inputs: Any, clean: bool = False, **options: Any) -> Program:
    """Export a module with its real weights; `clean` removes no-ops."""
    exported = torch.export.export(module.eval().requires_grad_(False), inputs, **options)
    graph_module, names = lift_constants(exported)
    config = read_config(KINDS["lfm2"])  # passes do not read it
    program = Program(graph_module, config, (), {name: Weight((name,)) for name in names})
    if clean:
        apply([RemoveNoOps()], program)
    return program


def run_program(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    program.module.recompile()
    return tuple(program.module(*inputs))


def count_rewrites(step: Pass, program: Program, *inputs: Tensor) -> int:
    """Apply a pass, assert that results stay within its tolerance, return the rewrites."""
    before = run_program(program, *inputs)
    weights = {name: copy.copy(get_constant(program, name)) for name in program.weights}
    (record,) = apply([step], program)
    module = program.bind(
        lambda name, weight: (
            torch.cat([weights[s] for s in weight.sources])
            if name not in weights
            else weights[name]
        )
    )
    after = module(*inputs)
    for old, new in zip(before, after, strict=True):
        assert old.shape == new.shape
        assert float((old - new).abs().max()) <= step.tolerance * float(old.abs().max())
    return record.changed


def get_constant(program: Program, name: str) -> Tensor:
    value: Any = program.module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape: int, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(random(*shape, seed=seed))


def quantize(values: Tensor, number_format: Format) -> PackedTensor:
    """Quantize a matrix to nearest codes; the scales cover the range of each group."""
    (rows, columns), top = values.shape, (1 << number_format.bits) - 1
    groups = number_format.groups_per_row(columns)
    pad = groups * number_format.group - columns
    grouped = nn.functional.pad(values, (0, pad)).view(rows, groups, -1)
    low = grouped.amin(-1).clamp(max=0)
    if number_format.symmetric:
        scales = grouped.abs().amax(-1) / (number_format.zero_point or 1)
        zeros = torch.full_like(scales, number_format.zero_point)
    else:
        scales = (grouped.amax(-1).clamp(min=0) - low) / top
        zeros = (-low / scales.clamp(min=1e-9)).round().clamp(0, top)
    scales = scales.clamp(min=1e-6).to(getattr(torch, number_format.scale_dtype))
    codes = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return PackedTensor(
        number_format,
        (rows, columns),
        codes.clamp(0, top).to(torch.uint8).view(rows, -1),
        scales,
        None if number_format.symmetric else zeros.to(torch.uint8),
    )


@dataclass(frozen=True)
class QuantizedWeights:
    """Tensors by name, each with a format; computes values for `Program.bind`."""

    tensors: Mapping[str, Tensor]
    formats: Mapping[str, Format | Floats]

    def packed(self, name: str) -> PackedTensor | None:
        number_format = self.formats[name]
        if not isinstance(number_format, Format):
            return None
        return quantize(self.tensors[name], number_format)

    def dequantized(self, name: str) -> Tensor:
        packed = self.packed(name)
        return self.tensors[name] if packed is None else packed.dequantize()

    def value(self, name: str, weight: Weight) -> Tensor:
        if weight.part == "constant":
            return self.tensors[name]
        if weight.part == "values":
            return torch.cat([self.tensors[source] for source in weight.sources])
        tensors = []
        for source in weight.sources:
            packed = self.packed(source)
            assert packed is not None
            parts = {
                "codes": packed.packed_codes(),
                "scales": packed.scales,
                "zeros": packed.zeros,
            }
            tensors.append(parts[weight.part])
        return torch.cat(tensors)
