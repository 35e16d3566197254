"""Faults of lowering, and a target that lowers with a fault.

The target lowers a wrong copy of its inputs. `edit` changes the copy of the program. `stored` and
`floats` change tensors before they are stored. The reference stays right. So every target can have
the same fault, in the whole program and in every part that a trace cuts out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import PackedTensor, stack_rows
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.base import Artifact, Request, Target
from lfmc.verification.locate.cut import copy_program
from tests.faults.softmax import softmax_handler

Edit = Callable[[Program], None]
FUNCTIONAL = frozenset({"onnx", "coreml", "mlir"})  # these do not write states in place
ALL = frozenset({"onnx", "coreml", "executorch", "tvm", "mlir"})


@dataclass(frozen=True)
class Fault:
    """A fault in a kind of model (`tests.factories.KINDS`), and the place that lfmc must name.

    A trace must name `part` and `operator`: a layer and its operator, or "stored tensor" and the
    part of that tensor. In the latter case, `tensor` is a substring of the tensor's name. `targets`
    are the targets that can have the fault.
    """

    name: str
    about: str
    kind: str
    part: str
    operator: str
    edit: Edit | None = None
    stored: Mapping[str, Callable[[PackedTensor], PackedTensor]] = field(default_factory=dict)
    floats: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    sources: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None
    targets: frozenset[str] = ALL
    tensor: str = ""

    @property
    def is_stored(self) -> bool:
        return self.edit is None


@dataclass(frozen=True)
class FaultyTarget:
    """A target that lowers with a fault, and otherwise behaves as `target`."""

    target: Target
    fault: Fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        wrong_program = copy_program(program)
        if self.fault.edit is not None:
            with torch.no_grad():
                self.fault.edit(wrong_program)
        wrong_weights = FaultyWeights(
            weights.checkpoint, weights.plan, fault=self.fault, right=weights
        )
        with softmax_handler(self.target.name):
            return self.target.lower(wrong_program, wrong_weights, request, folder)


@dataclass
class FaultyWeights(PlannedWeights):
    """Weights with a fault; `right` are the weights without it."""

    fault: Fault = field(kw_only=True)
    right: PlannedWeights = field(kw_only=True)

    def packed(self, sources: tuple[str, ...]) -> PackedTensor:
        order = sources if self.fault.sources is None else self.fault.sources(sources)
        return stack_rows([self._wrong_packed(name) for name in order])

    def _wrong_packed(self, name: str) -> PackedTensor:
        packed = self.right.packed((name,))
        for part, change in self.fault.stored.items():
            packed = change(packed) if part in name else packed
        return packed

    def floats(self, sources: tuple[str, ...]) -> Tensor:
        return torch.cat([self._wrong_floats(name) for name in sources])

    def _wrong_floats(self, name: str) -> Tensor:
        value = self.right.floats((name,))
        for part, change in self.fault.floats.items():
            value = change(value) if part in name else value
        return value
