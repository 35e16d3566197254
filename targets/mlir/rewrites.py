"""Rewrites of a linalg module for IREE, by torch-mlir's Python bindings.

1. `keep_matmuls_apart`: a matrix is unpacked once, not for every token.
2. MLIR's own fusion: one loop for elementwise operators and the sum behind them.
3. `fuse_gated_short_convs`: one loop for each of one token.
4. `tile_products`, on a CPU: how the loops of n-bit products are cut. Left to itself IREE
   vectorizes along the sum, which takes a shuffle for every element; 16 rows lie side by side in
   the parameters so that vectors can go along them, and sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_mlir import ir

from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.dialects import run_passes
from lfmc.targets.mlir.gated_conv import BARRIER, fuse_gated_short_convs, keep_shapes
from lfmc.targets.shared.row_blocks import ROWS

FUSION = "func.func(linalg-fold-unit-extent-dims,linalg-fuse-elementwise-ops,canonicalize,cse)"
BLOCKS = 16  # of rows that a task takes
TILED = "compilation_info"


def make_ready(module: Any, device: Device) -> None:
    """All rewrites for a device, in order."""
    module.context.allow_unregistered_dialects = True
    keep_matmuls_apart(module)
    keep_shapes(module)
    run_passes(module, FUSION)
    fuse_gated_short_convs(module)
    if device.is_cpu:
        tile_products(module)
    module.operation.verify()  # one that is wrong would be printed in another form


def tile_products(module: Any) -> int:
    """Tell every n-bit product of vectors how its loops are cut; returns how many there are."""
    found: list[Any] = []

    def visit(operation: Any) -> Any:
        if _is_product(operation):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    with module.context:
        for operation in found:
            put_sums_innermost(operation)
            operation.attributes[TILED] = _cuts(_loops(operation))
    return len(found)


def put_sums_innermost(operation: Any) -> None:
    """Order the loops of a `linalg.generic`: sums behind all others, else as they are."""
    kinds = _kinds(operation)
    order = sorted(range(len(kinds)), key=lambda index: kinds[index] == "reduction")
    place = {old: new for new, old in enumerate(order)}
    moved = ir.AffineMap.get_permutation([place[index] for index in range(len(kinds))])
    attributes = operation.attributes
    maps = [held.value for held in attributes["indexing_maps"]]
    attributes["indexing_maps"] = ir.ArrayAttr.get(
        [
            ir.AffineMapAttr.get(
                ir.AffineMap.get(len(kinds), 0, [r.compose(moved) for r in held.results])
            )
            for held in maps
        ]
    )
    held_kinds = list(attributes["iterator_types"])
    attributes["iterator_types"] = ir.ArrayAttr.get([held_kinds[old] for old in order])
    for inner in operation.regions[0].blocks[0].operations:
        if inner.operation.name == "linalg.index":
            dim = inner.operation.attributes["dim"]
            index = ir.IntegerAttr(dim).value
            inner.operation.attributes["dim"] = ir.IntegerAttr.get(dim.type, place[index])


def _kinds(operation: Any) -> list[str]:
    """Of loops: `parallel` or `reduction`."""
    kinds = operation.attributes["iterator_types"]
    return [str(kind).split("<")[-1].rstrip(">") for kind in kinds]


def _is_product(operation: Any) -> bool:
    """Sums over groups and bytes of a group, of packed codes."""
    if operation.name != "linalg.generic" or _kinds(operation).count("reduction") != 2:
        return False
    types = [ir.RankedTensorType(value.type) for value in operation.operands]
    return any(str(kind.element_type) == "i8" and kind.rank > 3 for kind in types)


def _loops(operation: Any) -> list[tuple[str, int]]:
    """Kinds and sizes of loops."""
    kinds = _kinds(operation)
    sizes = [0] * len(kinds)
    for value, held in zip(operation.operands, operation.attributes["indexing_maps"], strict=True):
        shape = ir.RankedTensorType(value.type).shape
        for size, result in zip(shape, held.value.results, strict=True):
            if isinstance(result, ir.AffineDimExpr):
                sizes[result.position] = size
    return list(zip(kinds, sizes, strict=True))


def _cuts(loops: Sequence[tuple[str, int]]) -> Any:
    shared, common, sums = ([0] * len(loops) for _ in range(3))
    for index, (kind, _) in enumerate(loops):
        (common if kind == "parallel" else sums)[index] = 1
        shared[index] = int(kind == "parallel")
    lanes = len(loops) - 3
    shared[lanes] = common[lanes] = ROWS
    if lanes:
        shared[lanes - 1] = BLOCKS
    config = (
        f"distribution = {shared}, vector_common_parallel = {common}, vector_reduction = {sums}"
    )
    info = (
        f"#iree_codegen.compilation_info<lowering_config = #iree_cpu.lowering_config<{config}>, "
        "translation_info = #iree_codegen.translation_info<"
        "pipeline = #iree_cpu.pipeline<DoubleTilingExpert>>>"
    )
    return ir.Attribute.parse(info)


def keep_matmuls_apart(module: Any) -> int:
    """Hide from IREE where operands of matmuls come from; returns how many matmuls there are.

    It would move reshapes of an unpacked matrix through the matmul, and elementwise operators into
    it, until it no longer knows that it is one.
    """
    found: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name in ("linalg.matmul", "linalg.batch_matmul"):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for operation in found:
        with ir.InsertionPoint(operation), operation.location:
            for index, value in enumerate(list(operation.operands)[:2]):
                hidden = ir.Operation.create(BARRIER, results=[value.type], operands=[value])
                operation.operands[index] = hidden.results[0]
    return len(found)
