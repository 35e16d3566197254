"""Records module outputs with forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn

Outputs = dict[str, list[Tensor]]  # by module name, in the order of the first outputs


@contextmanager
def recording(module: nn.Module, name: str, outputs: Outputs | None) -> Iterator[None]:
    """Add the float outputs of a module and of all modules in it to `outputs`, if it is not None.

    `outputs` maps the names of modules to the outputs of all calls while the context is open. If a
    module returns a tuple, its first item is recorded.
    """
    if outputs is None:
        yield
        return

    def hook(path: str) -> Callable[..., None]:
        def record(_module: object, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if has_float_rows(first):
                outputs.setdefault(path, []).append(first.detach())

        return record

    handles = [
        inner.register_forward_hook(hook(f"{name}.{path}" if path else name))
        for path, inner in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_float_rows(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a float tensor of at least two dims."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
