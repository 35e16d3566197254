"""Handlers of a softmax for targets without one; no LFM has a separate softmax operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def _softmax_handler(target: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Return the handler table of a target, and a handler of softmax."""
    if target == "onnx":
        from lfmc.targets.onnx import handlers as onnx

        return onnx.HANDLERS, lambda lowering, node: lowering.emitter.op(
            "Softmax", lowering.value(node.args[0]), axis=-1
        )
    from coremltools.converters.mil import Builder

    from lfmc.targets.coreml import handlers as coreml

    return coreml.HANDLERS, lambda lowering, node: Builder.softmax(
        x=lowering.value(node.args[0]), axis=-1
    )


@contextmanager
def softmax_handler(target: str) -> Iterator[None]:
    """Add a softmax handler to a target that does not run torch operators without a handler."""
    if target not in ("onnx", "coreml"):
        yield
        return
    handlers, handler = _softmax_handler(target)
    handlers["aten.softmax"] = handler
    try:
        yield
    finally:
        del handlers["aten.softmax"]
