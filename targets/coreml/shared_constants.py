"""Small constants of a program, each written once.

coremltools writes every argument of every operator as a constant of its own: a third of a program.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def share_constants(block: Any, kept: Collection[str]) -> None:
    """Have operators of a block (of MIL's protobuf) share equal constants; not those of `kept`.

    Only constants whose value is in the program itself; those in the weight file stay.
    """
    first: dict[bytes, str] = {}
    instead: dict[str, str] = {}
    operations = []
    for op in block.operations:
        for value in op.inputs.values():
            for argument in value.arguments:
                if argument.name in instead:
                    argument.name = instead[argument.name]
        if op.type == "const" and op.attributes["val"].HasField("immediateValue"):
            name = op.outputs[0].name
            own = first.setdefault(op.attributes["val"].SerializeToString(), name)
            if own != name and name not in kept:
                instead[name] = own
                continue
        operations.append(op)
    del block.operations[:]
    block.operations.extend(operations)
