"""Quantize and export Liquid Foundation Models; every exported model is run and checked.

    import lfmc

    bundle = lfmc.export("LiquidAI/LFM2-1.2B", target="onnx", bits_per_weight=4.5)
    print("".join(lfmc.generate(bundle, "Why is the sky blue?")))

    model = lfmc.load(bundle)
    logits = model.step([1, 2, 3])  # float32 [T, V]; the state is kept for the next call
    model.reset()

Names are imported when they are first used, so `import lfmc` itself is quick.
"""
# ruff: noqa: F405

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfmc.version import __version__

if TYPE_CHECKING:  # the same names as `lfmc.api.__all__`, which tests/lfmc/test_api.py compares
    from lfmc.api import *  # noqa: F403

__all__ = [
    "AlphaQOptions",
    "BitPlan",
    "Bundle",
    "Checkpoint",
    "Effort",
    "GateError",
    "InputError",
    "LfmcError",
    "PlanRow",
    "Stepper",
    "UnsupportedError",
    "__version__",
    "export",
    "generate",
    "load",
    "load_tokenizer",
    "open_bundle",
    "open_checkpoint",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lfmc import api

        return getattr(api, name)
    raise AttributeError(f"module 'lfmc' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
