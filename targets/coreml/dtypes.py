"""The two dtypes of activations, and the cast between them."""

from __future__ import annotations

from typing import Any

from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

HALF, WIDE = types.fp16, types.fp32


def cast(x: Var, dtype: Any) -> Var:
    """Return `x` cast to `dtype`, or `x` itself if it has this dtype."""
    if x.dtype == dtype:
        return x
    return mb.cast(x=x, dtype=types.builtin_to_string(dtype))
