"""From the stateful module to a .pte: export, delegation to XNNPACK, serialization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.export import Dim

from lfmc.quiet import quiet
from lfmc.targets.executorch.library import mute
from lfmc.targets.executorch.module import Stateful

DELEGATE = "executorch_call_delegate"


def lower(module: Stateful, chunk: int, facts: Mapping[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The program's bytes, and how often it calls delegates and each operator outside of them.

    `forward` takes 1 to `chunk` tokens; `facts` become methods without arguments.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    example = (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with quiet(), mute(), torch.no_grad():
        module(*example)  # makes the constants
        shapes = ({1: Dim("length", min=1, max=chunk)}, None)
        exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=dict(facts),
        )
        nodes = edge.exported_program().graph.nodes
        names = (_name(node) for node in nodes if node.op == "call_function")
        calls = Counter(name for name in names if name is not None)
        return edge.to_executorch().buffer, dict(calls)


def _name(node: torch.fx.Node) -> str | None:
    """An operator's name; None for arithmetic of sizes, and for taking a result of several."""
    target = node.args[0] if node.target is auto_functionalized_v2 else node.target
    if getattr(target, "__module__", "") in ("_operator", "builtins"):
        return None
    name = getattr(target, "_name", None) or getattr(target, "__name__", str(target))
    return str(name).replace("::", ".").removesuffix(".default")
