"""remove-dead-code: removes nodes that no output depends on and constants that no node reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lfmc.graph.program import Program


@dataclass(frozen=True)
class RemoveDeadCode:
    name: ClassVar[str] = "remove-dead-code"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        before = len(program.graph.nodes)
        for node in reversed(list(program.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                program.graph.erase_node(node)
        targets = {node.target for node in program.graph.nodes if node.op == "get_attr"}
        program.weights = {k: v for k, v in program.weights.items() if k in targets}
        program.module.delete_all_unused_submodules()
        return before - len(program.graph.nodes)
