"""Rewrites of a linalg module for IREE, by torch-mlir's Python bindings.

1. `isolate_matmuls`: a matrix is unpacked once, not for every token.
2. MLIR's own fusion: elementwise operators and the sum that follows them become one loop.
3. `fuse_gated_short_convs`: each gated short convolution of one token becomes one loop.
4. `tile_products`, on a CPU: sets the tile sizes of n-bit products. By default IREE vectorizes
   along the sum, which needs a shuffle for every element. The parameters interleave 16 rows, so
   that vectors can run along the rows and sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_mlir import ir

from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.dialects import run_passes
from lfmc.targets.mlir.gated_conv import BARRIER, fuse_gated_short_convs, hide_gate_results
from lfmc.targets.shared.row_blocks import ROWS

FUSION = "func.func(linalg-fold-unit-extent-dims,linalg-fuse-elementwise-ops,canonicalize,cse)"
BLOCKS_PER_TASK = 16  # blocks of rows
TILING_ATTRIBUTE = "compilation_info"


def prepare_for_iree(module: Any, device: Device) -> None:
    """Run all rewrites for a device, in order."""
    module.context.allow_unregistered_dialects = True
    isolate_matmuls(module)
    hide_gate_results(module)
    run_passes(module, FUSION)
    fuse_gated_short_convs(module)
    if device.is_cpu:
        tile_products(module)
    module.operation.verify()  # an invalid module would be printed in another form


def tile_products(module: Any) -> int:
    """Set the tile sizes of every n-bit product of vectors; return the number of products."""
    products: list[Any] = []

    def visit(operation: Any) -> Any:
        if _is_product(operation):
            products.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    with module.context:
        for operation in products:
            move_sums_innermost(operation)
            operation.attributes[TILING_ATTRIBUTE] = _tiling(_loops(operation))
    return len(products)


def move_sums_innermost(operation: Any) -> None:
    """Move the reduction loops of a `linalg.generic` innermost; otherwise keep the order."""
    kinds = _loop_kinds(operation)
    order = sorted(range(len(kinds)), key=lambda index: kinds[index] == "reduction")
    new_position = {old: new for new, old in enumerate(order)}
    permutation = ir.AffineMap.get_permutation([new_position[index] for index in range(len(kinds))])
    attributes = operation.attributes
    maps = [index_map.value for index_map in attributes["indexing_maps"]]
    attributes["indexing_maps"] = ir.ArrayAttr.get(
        [
            ir.AffineMapAttr.get(
                ir.AffineMap.get(len(kinds), 0, [r.compose(permutation) for r in index_map.results])
            )
            for index_map in maps
        ]
    )
    iterator_types = list(attributes["iterator_types"])
    attributes["iterator_types"] = ir.ArrayAttr.get([iterator_types[old] for old in order])
    for inner in operation.regions[0].blocks[0].operations:
        if inner.operation.name == "linalg.index":
            dim = inner.operation.attributes["dim"]
            index = ir.IntegerAttr(dim).value
            inner.operation.attributes["dim"] = ir.IntegerAttr.get(dim.type, new_position[index])


def _loop_kinds(operation: Any) -> list[str]:
    """Return the kind of each loop: `parallel` or `reduction`."""
    kinds = operation.attributes["iterator_types"]
    return [str(kind).split("<")[-1].rstrip(">") for kind in kinds]


def _is_product(operation: Any) -> bool:
    """Return whether an operation sums packed codes over groups and over bytes of a group."""
    if operation.name != "linalg.generic" or _loop_kinds(operation).count("reduction") != 2:
        return False
    types = [ir.RankedTensorType(value.type) for value in operation.operands]
    return any(str(kind.element_type) == "i8" and kind.rank > 3 for kind in types)


def _loops(operation: Any) -> list[tuple[str, int]]:
    """Return the kind and the size of each loop."""
    kinds = _loop_kinds(operation)
    sizes = [0] * len(kinds)
    for value, index_map in zip(
        operation.operands, operation.attributes["indexing_maps"], strict=True
    ):
        shape = ir.RankedTensorType(value.type).shape
        for size, result in zip(shape, index_map.value.results, strict=True):
            if isinstance(result, ir.AffineDimExpr):
                sizes[result.position] = size
    return list(zip(kinds, sizes, strict=True))


def _tiling(loops: Sequence[tuple[str, int]]) -> Any:
    """Return IREE's attribute with the tile sizes of an n-bit product."""
    task_sizes, parallel_sizes, reduction_sizes = ([0] * len(loops) for _ in range(3))
    for index, (kind, _) in enumerate(loops):
        (parallel_sizes if kind == "parallel" else reduction_sizes)[index] = 1
        task_sizes[index] = int(kind == "parallel")
    lane_loop = len(loops) - 3
    task_sizes[lane_loop] = parallel_sizes[lane_loop] = ROWS
    if lane_loop:
        task_sizes[lane_loop - 1] = BLOCKS_PER_TASK
    config = (
        f"distribution = {task_sizes}, vector_common_parallel = {parallel_sizes}, "
        f"vector_reduction = {reduction_sizes}"
    )
    info = (
        f"#iree_codegen.compilation_info<lowering_config = #iree_cpu.lowering_config<{config}>, "
        "translation_info = #iree_codegen.translation_info<"
        "pipeline = #iree_cpu.pipeline<DoubleTilingExpert>>>"
    )
    return ir.Attribute.parse(info)


def isolate_matmuls(module: Any) -> int:
    """Insert barriers before the operands of matmuls; return the number of matmuls.

    Without them IREE moves reshapes of an unpacked matrix through the matmul, and elementwise
    operators into it, until it no longer recognizes the matmul.
    """
    matmuls: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name in ("linalg.matmul", "linalg.batch_matmul"):
            matmuls.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for operation in matmuls:
        with ir.InsertionPoint(operation), operation.location:
            for index, value in enumerate(list(operation.operands)[:2]):
                barrier = ir.Operation.create(BARRIER, results=[value.type], operands=[value])
                operation.operands[index] = barrier.results[0]
    return len(matmuls)
