"""The gated short convolution of one token as one loop, recognised in linalg.

    newest = B * x                             is kept, as the filter's state, and
    y = C * (taps[0] s[0] + ... + taps[k] newest)    reads it

MLIR's fusion leaves a value alone that two operators read. Here the loop that makes `y` makes
`newest` as well, as a second result. `keep_shapes` goes before that fusion, which would otherwise
give `y` the shape that the next product wants, and `fuse_gated_short_convs` behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch_mlir import ir

GENERIC, SLICE = "linalg.generic", "tensor.extract_slice"
PRODUCT = ["arith.mulf", "linalg.yield"]
BARRIER = "util.optimization_barrier"  # of IREE; a name without meaning to torch-mlir


def keep_shapes(module: Any) -> int:
    """Hide what reads `y` from MLIR's fusion; returns how many there are."""
    loops = _loops(module)
    sources = [source for loop in loops if (source := _projection(loop)) is not None]
    found = [loop for loop in loops if _gates(loop, sources)]
    for loop in found:
        hide(loop.results[0])
    return len(found)


def hide(value: Any) -> Any:
    """A barrier behind a value, through which all others read it."""
    owner = value.owner.operation
    uses = [(use.owner.operation, use.operand_number) for use in value.uses]
    with ir.InsertionPoint(owner), owner.location:
        barrier = ir.Operation.create(BARRIER, results=[value.type], operands=[value])
    barrier.move_after(owner)
    for user, index in uses:
        user.operands[index] = barrier.results[0]
    return barrier.results[0]


def fuse_gated_short_convs(module: Any) -> int:
    """Make one loop of each gated short convolution of one token; returns how many there are."""
    found = list(_matches(module))
    for product, consumer in found:
        _fuse(product, consumer)
    return len(found)


def _matches(module: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of `B * x` and the loop that reads it, both over slices of one projection."""
    for product in _loops(module):
        source = _projection(product)
        users = [use.owner for use in product.results[0].uses]
        readers = [user for user in users if user.operation.name == GENERIC]
        if source is None or len(users) < 2 or len(readers) != 1:
            continue
        (consumer,) = readers
        if not _pointwise(consumer) or source not in _sources(consumer):
            continue
        later = [value for own in _between(product, consumer) for value in own.results]
        if not any(value in later for value in consumer.operands):
            yield product, consumer.operation


def _loops(module: Any) -> list[Any]:
    loops: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == GENERIC:
            loops.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return loops


def _gates(loop: Any, sources: list[Any]) -> bool:
    """Whether a loop multiplies something by a slice of what two others are cut from."""
    if _body(loop) != PRODUCT:
        return False
    cut = [source in sources for source in _sources(loop)]
    return len(loop.operands) == 3 and len(cut) == 1 and cut[0]


def _body(loop: Any) -> list[str]:
    return [operation.operation.name for operation in loop.regions[0].blocks[0].operations]


def _projection(loop: Any) -> Any | None:
    """What both factors of a pointwise product of two slices are cut from."""
    if _body(loop) != PRODUCT or not _pointwise(loop):
        return None
    sources = _sources(loop)
    return sources[0] if len(sources) == 2 and sources[0] == sources[1] else None


def _sources(loop: Any) -> list[Any]:
    """What those of a loop's operands are cut from that are slices."""
    owners = [value.owner for value in loop.operands if not isinstance(value.owner, ir.Block)]
    return [owner.operands[0] for owner in owners if owner.operation.name == SLICE]


def _pointwise(loop: Any) -> bool:
    """Every element of one result from the same element of all operands."""
    maps = [held.value for held in loop.attributes["indexing_maps"]]
    count = len(loop.attributes["iterator_types"])
    parallel = all("parallel" in str(kind) for kind in loop.attributes["iterator_types"])
    identity = ir.AffineMap.get_identity(count, loop.context)
    return parallel and len(loop.results) == 1 and all(held == identity for held in maps)


def _fuse(product: Any, consumer: Any) -> None:
    with consumer.location, ir.InsertionPoint(consumer):
        made = last = _loop(product, consumer)
    for reader in _between(product, consumer):
        if reader != made:
            reader.move_after(last)
            last = reader
    consumer.results[0].replace_all_uses_with(made.results[0])
    product.results[0].replace_all_uses_with(made.results[1])
    consumer.erase()
    product.erase()


def _loop(product: Any, consumer: Any) -> Any:
    """Both bodies in one loop, whose results are those of `consumer` and of `product`."""
    inputs: list[Any] = []
    outputs: list[Any] = []
    for loop in (product, consumer):
        *own, output = loop.operands
        inputs += [value for value in own if value != product.results[0]]
        outputs.insert(0, output)
    identity = consumer.attributes["indexing_maps"][0]
    operands = [*inputs, *outputs]
    made = ir.Operation.create(
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
    locations = [made.location] * len(elements)
    block = made.regions[0].blocks.append(*elements, arg_locs=locations)
    arguments = iter(block.arguments)
    known: list[tuple[Any, Any]] = []  # values of the old bodies, and of the new one
    with ir.InsertionPoint(block):
        results: list[Any] = []
        for loop in (product, consumer):
            body = loop.regions[0].blocks[0]
            for value, argument in zip(loop.operands[:-1], body.arguments, strict=False):
                is_product = value == product.results[0]
                known.append((argument, results[0] if is_product else next(arguments)))
            results.append(_clone(body, known))
        ir.Operation.create("linalg.yield", operands=results[::-1])
    return made


def _clone(body: Any, known: list[tuple[Any, Any]]) -> Any:
    """Copy a body at the insertion point; what it yields."""

    def new(value: Any) -> Any:
        return next((own for old, own in known if old == value), value)

    *steps, end = (operation.operation for operation in body.operations)
    for step in steps:
        copy = step.clone()
        for index, value in enumerate(step.operands):
            copy.operands[index] = new(value)
        known += zip(step.results, copy.results, strict=True)
    return new(end.operands[0])


def _between(product: Any, consumer: Any) -> list[Any]:
    """What reads the product's result, at first or second hand, and comes before `consumer`."""
    waiting, found, begun = list(product.results), [], False
    for view in product.parent.regions[0].blocks[0].operations:
        own = view.operation
        if own == consumer:
            break
        if begun and any(value in waiting for value in _read(own)):
            waiting += own.results
            found.append(own)
        begun = begun or own == product
    return found


def _read(operation: Any) -> list[Any]:
    """Every value that an operation reads, in its regions, too."""
    found: list[Any] = []

    def visit(own: Any) -> Any:
        found.extend(own.operands)
        return ir.WalkResult.ADVANCE

    operation.walk(visit)
    return found
