"""Forms of a softmax for targets that have none: no LFM has one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def _softmax_forms(target: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A target's table of forms, and one for the operator that no LFM has."""
    if target == "onnx":
        from lfmc.targets.onnx import handlers as onnx

        return onnx.HANDLERS, lambda low, node: low.emit.op(
            "Softmax", low.value(node.args[0]), axis=-1
        )
    from coremltools.converters.mil import Builder

    from lfmc.targets.coreml import handlers as coreml

    return coreml.HANDLERS, lambda low, node: Builder.softmax(x=low.value(node.args[0]), axis=-1)


@contextmanager
def knowing_softmax(target: str) -> Iterator[None]:
    """A target that has a form for a softmax of its own, where it runs no plain operators."""
    if target not in ("onnx", "coreml"):
        yield
        return
    table, form = _softmax_forms(target)
    table["aten.softmax"] = form
    try:
        yield
    finally:
        del table["aten.softmax"]
