"""From the stateful module to a .pte: export, delegation to XNNPACK, serialization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim

from lfmc.targets.executorch.library import mute, quiet
from lfmc.targets.executorch.module import Stateful

DELEGATE = "executorch_call_delegate"


def lower(module: Stateful, chunk: int, facts: Mapping[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The program's bytes, and how often it calls each operator that is in no delegate.

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
        outside = Counter(
            _name(node)
            for node in edge.exported_program().graph.nodes
            if node.op == "call_function"
        )
        return edge.to_executorch().buffer, dict(outside)


def _name(node: torch.fx.Node) -> str:
    name = getattr(node.target, "_name", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).replace("::", ".").removesuffix(".default")
