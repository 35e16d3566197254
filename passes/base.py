"""What a pass is, and how one is run: rewrite, then check the graph and what the pass ensures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

import lfmc.graph.ops  # noqa: F401 (registers the operators that passes write)
from lfmc.errors import LfmcError
from lfmc.graph.program import Program


class Pass(Protocol):
    """A graph rewrite: a frozen dataclass whose fields are its options.

    `tolerance` is the largest change of a result, relative to its scale, that reordering float32
    arithmetic may bring; 0 for a pass that is exact. `ensures` are operators (short names) that no
    longer occur afterwards.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float]
    ensures: ClassVar[tuple[str, ...]]

    def run(self, program: Program) -> int:
        """Rewrite `program` in place; return the number of places changed."""


@dataclass(frozen=True)
class Applied:
    """One line of the record: which pass, how many places it changed."""

    name: str
    changed: int


class PassError(LfmcError):
    """A pass broke the graph: a bug in lfmc, with the passes that ran before it."""


def apply(passes: Sequence[Pass], program: Program) -> list[Applied]:
    """Run `passes` in order on `program`, in place, checking the graph after each.

    Raises `PassError` when a pass leaves an invalid graph, or an operator that it said it removes.
    """
    record: list[Applied] = []
    for step in passes:
        before = ", ".join(f"{done.name} ({done.changed})" for done in record) or "none"
        try:
            with torch.no_grad():
                changed = step.run(program)
            program.graph.lint()
        except (RuntimeError, TypeError, KeyError, IndexError) as error:
            raise PassError(
                f"pass '{step.name}' failed", got=error, where=f"after: {before}"
            ) from error
        left = [name for name in step.ensures if program.count(name)]
        if left:
            raise PassError(
                f"pass '{step.name}' left operators that it removes",
                where=f"after: {before}",
                got=", ".join(f"{name} x{program.count(name)}" for name in left),
            )
        record.append(Applied(step.name, changed))
    program.module.recompile()
    return record
