"""Programs made from a few lines of torch, and what a pass did to them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lfmc.model import read_config
from lfmc.passes.base import Pass, apply
from lfmc.passes.remove_no_ops import RemoveNoOps
from lfmc.program import Program, Weight
from lfmc.trace import lift_constants
from tests.factories import KINDS


def program_of(module: nn.Module, *inputs: Any, clean: bool = False, **options: Any) -> Program:
    """The exported graph of a module, with its real weights; `clean` takes the no-ops out."""
    exported = torch.export.export(module.eval().requires_grad_(False), inputs, **options)
    graph_module, names = lift_constants(exported)
    config = read_config(KINDS["lfm2"])  # no pass reads it
    program = Program(graph_module, config, (), {name: Weight((name,)) for name in names})
    if clean:
        apply([RemoveNoOps()], program)
    return program


def run(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    program.module.recompile()
    return tuple(program.module(*inputs))


def changed(step: Pass, program: Program, *inputs: Tensor) -> int:
    """Apply a pass; assert that it changes no result beyond its tolerance; how often it fired."""
    before = run(program, *inputs)
    weights = {name: copy.copy(get(program, name)) for name in program.weights}
    (record,) = apply([step], program)
    bound = program.bind(
        lambda name, weight: torch.cat([weights[s] for s in weight.sources])
        if name not in weights
        else weights[name]
    )
    after = bound(*inputs)
    for old, new in zip(before, after, strict=True):
        assert old.shape == new.shape
        assert float((old - new).abs().max()) <= step.tolerance * float(old.abs().max())
    return record.changed


def get(program: Program, name: str) -> Tensor:
    value: Any = program.module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape: int, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(random(*shape, seed=seed))
