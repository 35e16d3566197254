"""remove-no-ops: removes operators that tracing inserts and that change no result.

    1. `_assert_tensor_metadata(x)`            ->  (nothing)
    2. `to(x)` if x already has the dtype      ->  x
    3. `contiguous(x)`, `alias(x)`, `clone(x)` ->  x
    4. `slice(x, dim, 0, end)` of a whole dim  ->  x
    5. `mul(x, 1.0)`                           ->  x

After this pass, the decoders of lfmc and of transformers have the same graph patterns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from lfmc.graph.program import Program, operator_name
from lfmc.passes.pattern import arguments

_COPIES = frozenset({"aten.contiguous", "aten.alias", "aten.detach", "aten.clone"})


@dataclass(frozen=True)
class RemoveNoOps:
    name: ClassVar[str] = "remove-no-ops"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ("aten._assert_tensor_metadata", *sorted(_COPIES))

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if operator_name(node) == "aten._assert_tensor_metadata":  # 1
                program.graph.erase_node(node)
            elif _is_no_op(node):
                program.replace(node, node.all_input_nodes[0])
            else:
                continue
            changed += 1
        return changed


def _is_no_op(node: fx.Node) -> bool:
    name = operator_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if name == "aten.to":  # 2
        before, after = source.meta.get("val"), node.meta.get("val")
        return before is not None and after is not None and before.dtype == after.dtype
    if name == "aten.slice":  # 4
        _, _, start, end, step = arguments(node)
        return start in (0, None) and end in (sys.maxsize, None) and step == 1
    if name == "aten.mul":  # 5
        is_one = isinstance(node.args[1], float) and node.args[1] == 1.0
        return is_one and source.meta["val"].is_floating_point()
    return name in _COPIES  # 3
