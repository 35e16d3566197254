"""What the modules of a model give while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn


@contextmanager
def module_outputs(
    model: nn.Module, only: Collection[str] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """While it lasts, what every module gives (or those of the names in `only`): floats, by name
    and call, in the order of first results. Of several results the first."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: object, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if is_shown(first):
                found.setdefault(name, []).append(first.detach())

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name and (only is None or name in only)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def is_shown(value: object) -> TypeGuard[Tensor]:
    """Whether a value has floats in rows."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
