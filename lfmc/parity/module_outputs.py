"""Records module outputs with forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn


@contextmanager
def record_module_outputs(
    model: nn.Module, names: Collection[str] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of all modules, or of those in `names`, while the context is open.

    Yields a dict that fills up while the model runs. It maps module names, in the order of their
    first outputs, to the float outputs of all calls. If a module returns a tuple, its first item is
    recorded.
    """
    outputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: object, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if has_float_rows(first):
                outputs.setdefault(name, []).append(first.detach())

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name and (names is None or name in names)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def has_float_rows(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a float tensor of at least two dims."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
