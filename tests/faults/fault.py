"""A fault of lowering, and a target that has it.

The target lowers something else than it is given: an `edit` changes a copy of the program, `stored`
a tensor on its way into the artifact. What the artifact is compared with stays right. So a fault is
made alike in every target, in the whole program and in all that a trace cuts out of it.
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
from lfmc.verification.locate.cut import copied
from tests.faults.softmax import knowing_softmax

Edit = Callable[[Program], None]
FUNCTIONAL = frozenset({"onnx", "coreml", "mlir"})  # states are values there, not written in place
ALL = frozenset({"onnx", "coreml", "executorch", "tvm", "mlir"})


@dataclass(frozen=True)
class Fault:
    """What is wrong, in which kind of model (`tests.factories.KINDS`), and what has to name it.

    `part` and `operator` are the place that a trace must name: an operator of a layer, or of a
    stored tensor which piece, and then `tensor` is a part of its name. `targets` can have it.
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
    """A target that lowers with a fault; all else is the target's own."""

    target: Target
    fault: Fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        given = copied(program)
        if self.fault.edit is not None:
            with torch.no_grad():
                self.fault.edit(given)
        wrong = FaultyWeights(weights.checkpoint, weights.plan, fault=self.fault, right=weights)
        with knowing_softmax(self.target.name):
            return self.target.lower(given, wrong, request, folder)


@dataclass
class FaultyWeights(PlannedWeights):
    """Weights of which some are not those that `right` has."""

    fault: Fault = field(kw_only=True)
    right: PlannedWeights = field(kw_only=True)

    def packed(self, sources: tuple[str, ...]) -> PackedTensor:
        order = sources if self.fault.sources is None else self.fault.sources(sources)
        return stack_rows([self._wrong(name) for name in order])

    def _wrong(self, name: str) -> PackedTensor:
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
