"""lfmc: quantize and export Liquid Foundation Models, with every artifact proven.

    import lfmc

    bundle = lfmc.export("LFM2-1.2B", target="onnx", bits_per_weight=4.5)
    model = lfmc.load(bundle.path)
    logits = model.step([1, 2, 3])  # float32 [T, V]; state is carried to the next call

`open_checkpoint`, `plan`, `export`, `verify`, `load` and `AlphaQOptions` are imported when they are
first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "AlphaQOptions",
    "Effort",
    "__version__",
    "export",
    "load",
    "open_checkpoint",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lfmc import api

        return getattr(api, name)
    raise AttributeError(f"module 'lfmc' has no attribute '{name}'")
