"""Fusion of the gated short convolution of one token into one loop of linalg.

    newest = B * x                                   becomes part of the filter's state
    y = C * (taps[0] s[0] + ... + taps[k] newest)    reads it

MLIR's fusion does not fuse a value that two operators read. The merged loop computes `y` and, as a
second result, `newest`. `hide_gate_results` runs before MLIR's fusion, which would otherwise
reshape `y` for the next product. `fuse_gated_short_convs` runs after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch_mlir import ir

GENERIC, SLICE = "linalg.generic", "tensor.extract_slice"
PRODUCT = ["arith.mulf", "linalg.yield"]
BARRIER = "util.optimization_barrier"  # an operation of IREE, unregistered in torch-mlir


def hide_gate_results(module: Any) -> int:
    """Insert a barrier after every `y`, against MLIR's fusion; return the number of barriers."""
    loops = _loops(module)
    sources = [source for loop in loops if (source := _common_source(loop)) is not None]
    gates = [loop for loop in loops if _is_gate(loop, sources)]
    for loop in gates:
        insert_barrier(loop.results[0])
    return len(gates)


def insert_barrier(value: Any) -> Any:
    """Insert a barrier after a value; all users of the value read the barrier's result."""
    owner = value.owner.operation
    uses = [(use.owner.operation, use.operand_number) for use in value.uses]
    with ir.InsertionPoint(owner), owner.location:
        barrier = ir.Operation.create(BARRIER, results=[value.type], operands=[value])
    barrier.move_after(owner)
    for user, index in uses:
        user.operands[index] = barrier.results[0]
    return barrier.results[0]


def fuse_gated_short_convs(module: Any) -> int:
    """Merge each gated short convolution of one token into one loop; return their number."""
    pairs = list(_find_pairs(module))
    for product, consumer in pairs:
        _fuse(product, consumer)
    return len(pairs)


def _find_pairs(module: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of the loop `B * x` and the loop that reads it, with slices of one projection."""
    for product in _loops(module):
        source = _common_source(product)
        users = [use.owner for use in product.results[0].uses]
        readers = [user for user in users if user.operation.name == GENERIC]
        if source is None or len(users) < 2 or len(readers) != 1:
            continue
        (consumer,) = readers
        if not _is_pointwise(consumer) or source not in _slice_sources(consumer):
            continue
        readers_between = _readers_between(product, consumer)
        intermediates = [value for reader in readers_between for value in reader.results]
        if not any(value in intermediates for value in consumer.operands):
            yield product, consumer.operation


def _loops(module: Any) -> list[Any]:
    loops: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == GENERIC:
            loops.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return loops


def _is_gate(loop: Any, sources: list[Any]) -> bool:
    """Return whether a loop multiplies a value by a slice of one of the sources."""
    if _body(loop) != PRODUCT:
        return False
    slice_sources = _slice_sources(loop)
    return len(loop.operands) == 3 and len(slice_sources) == 1 and slice_sources[0] in sources


def _body(loop: Any) -> list[str]:
    return [operation.operation.name for operation in loop.regions[0].blocks[0].operations]


def _common_source(loop: Any) -> Any | None:
    """Return the tensor that both factors of a pointwise product are slices of, else None."""
    if _body(loop) != PRODUCT or not _is_pointwise(loop):
        return None
    sources = _slice_sources(loop)
    return sources[0] if len(sources) == 2 and sources[0] == sources[1] else None


def _slice_sources(loop: Any) -> list[Any]:
    """Return the sliced tensors of those operands of a loop that are slices."""
    owners = [value.owner for value in loop.operands if not isinstance(value.owner, ir.Block)]
    return [owner.operands[0] for owner in owners if owner.operation.name == SLICE]


def _is_pointwise(loop: Any) -> bool:
    """Return whether each result element depends on the same element of every operand only."""
    maps = [index_map.value for index_map in loop.attributes["indexing_maps"]]
    count = len(loop.attributes["iterator_types"])
    parallel = all("parallel" in str(kind) for kind in loop.attributes["iterator_types"])
    identity = ir.AffineMap.get_identity(count, loop.context)
    return parallel and len(loop.results) == 1 and all(index_map == identity for index_map in maps)


def _fuse(product: Any, consumer: Any) -> None:
    with consumer.location, ir.InsertionPoint(consumer):
        merged = last = _merge_loops(product, consumer)
    for reader in _readers_between(product, consumer):
        if reader != merged:
            reader.move_after(last)
            last = reader
    consumer.results[0].replace_all_uses_with(merged.results[0])
    product.results[0].replace_all_uses_with(merged.results[1])
    consumer.erase()
    product.erase()


def _merge_loops(product: Any, consumer: Any) -> Any:
    """Create one loop with both bodies; its results are those of `consumer` and of `product`."""
    inputs: list[Any] = []
    outputs: list[Any] = []
    for loop in (product, consumer):
        *loop_inputs, output = loop.operands
        inputs += [value for value in loop_inputs if value != product.results[0]]
        outputs.insert(0, output)
    identity = consumer.attributes["indexing_maps"][0]
    operands = [*inputs, *outputs]
    merged = ir.Operation.create(
        GENERIC,
        results=[consumer.results[0].type, product.results[0].type],
        operands=operands,
        attributes={
            "indexing_maps": ir.ArrayAttr.get([identity] * len(operands)),
            "iterator_types": consumer.attributes["iterator_types"],
            "operandSegmentSizes": ir.DenseI32ArrayAttr.get([len(inputs), len(outputs)]),
        },
        regions=1,
    )
    elements = [ir.RankedTensorType(value.type).element_type for value in operands]
    locations = [merged.location] * len(elements)
    block = merged.regions[0].blocks.append(*elements, arg_locs=locations)
    arguments = iter(block.arguments)
    replacements: list[tuple[Any, Any]] = []  # values of the old bodies, and of the merged one
    with ir.InsertionPoint(block):
        results: list[Any] = []
        for loop in (product, consumer):
            body = loop.regions[0].blocks[0]
            for value, argument in zip(loop.operands[:-1], body.arguments, strict=False):
                is_product = value == product.results[0]
                replacements.append((argument, results[0] if is_product else next(arguments)))
            results.append(_clone_body(body, replacements))
        ir.Operation.create("linalg.yield", operands=results[::-1])
    return merged


def _clone_body(body: Any, replacements: list[tuple[Any, Any]]) -> Any:
    """Clone a body at the insertion point; return the value that it yields."""

    def replace(value: Any) -> Any:
        return next((new for old, new in replacements if old == value), value)

    *steps, end = (operation.operation for operation in body.operations)
    for step in steps:
        copy = step.clone()
        for index, value in enumerate(step.operands):
            copy.operands[index] = replace(value)
        replacements += zip(step.results, copy.results, strict=True)
    return replace(end.operands[0])


def _readers_between(product: Any, consumer: Any) -> list[Any]:
    """Return the operations before `consumer` that read the product's result, even indirectly."""
    derived_values, readers, after_product = list(product.results), [], False
    for view in product.parent.regions[0].blocks[0].operations:
        operation = view.operation
        if operation == consumer:
            break
        if after_product and any(value in derived_values for value in _operands_read(operation)):
            derived_values += operation.results
            readers.append(operation)
        after_product = after_product or operation == product
    return readers


def _operands_read(operation: Any) -> list[Any]:
    """Return every value that an operation and its regions read."""
    operands: list[Any] = []

    def visit(inner: Any) -> Any:
        operands.extend(inner.operands)
        return ir.WalkResult.ADVANCE

    operation.walk(visit)
    return operands
