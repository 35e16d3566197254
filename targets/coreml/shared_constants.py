"""Deduplicate the small constants of a program.

coremltools writes every argument of every operator as a separate constant, which is a third of a
program.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def share_constants(block: Any, named_constants: Collection[str]) -> None:
    """Replace equal constants of a block (of MIL's protobuf) by one, except `named_constants`.

    Constants in the weight file stay: only values in the program itself are shared.
    """
    first_names: dict[bytes, str] = {}
    replacements: dict[str, str] = {}
    operations = []
    for op in block.operations:
        for value in op.inputs.values():
            for argument in value.arguments:
                if argument.name in replacements:
                    argument.name = replacements[argument.name]
        if op.type == "const" and op.attributes["val"].HasField("immediateValue"):
            name = op.outputs[0].name
            first_name = first_names.setdefault(op.attributes["val"].SerializeToString(), name)
            if first_name != name and name not in named_constants:
                replacements[name] = first_name
                continue
        operations.append(op)
    del block.operations[:]
    block.operations.extend(operations)
