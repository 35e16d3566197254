"""The interface of a pass, and `apply`, which runs passes and checks the graph after each."""

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

    `tolerance` is the largest change of a result, relative to the result's largest value, that the
    pass may cause by reordering float32 arithmetic; 0 for an exact pass. `ensures` lists operators
    (short names) that the graph does not contain after the pass.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float]
    ensures: ClassVar[tuple[str, ...]]

    def run(self, program: Program) -> int:
        """Rewrite `program` in place; return the number of rewrites."""


@dataclass(frozen=True)
class Applied:
    """The name of a pass that ran, and its number of rewrites."""

    name: str
    changed: int


class PassError(LfmcError):
    """A pass failed or left an invalid graph, which is a bug; `where` lists the earlier passes."""


def apply(passes: Sequence[Pass], program: Program) -> list[Applied]:
    """Run `passes` in order on `program`, in place, and check the graph after each pass.

    Raise `PassError` if a pass leaves an invalid graph, or an operator that it declares as removed.
    """
    record: list[Applied] = []
    for step in passes:
        before = ", ".join(f"{entry.name} ({entry.changed})" for entry in record) or "none"
        try:
            with torch.no_grad():
                changed = step.run(program)
            program.graph.lint()
        except (RuntimeError, TypeError, KeyError, IndexError) as error:
            raise PassError(
                f"pass '{step.name}' failed", got=error, where=f"after: {before}"
            ) from error
        remaining = [name for name in step.ensures if program.count(name)]
        if remaining:
            raise PassError(
                f"pass '{step.name}' left operators that it should remove",
                where=f"after: {before}",
                got=", ".join(f"{name} x{program.count(name)}" for name in remaining),
            )
        record.append(Applied(step.name, changed))
    program.module.recompile()
    return record
