"""Fixtures that lower each artifact once for all tests of targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfmc.bundle.bundle import Bundle, open_bundle
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tests.run_cache import RunCache
from tests.targets.lowering import Choose, Lowered, build_for, lower_once
from tests.targets.matrix import export_checked


@pytest.fixture(scope="session")
def lowered(
    any_checkpoint: Callable[[str], Checkpoint], run_cache: RunCache
) -> Callable[..., Lowered]:
    """Return `lowered(checkpoint, choose, target, option=value)`, which caches its artifacts.

    Processes of one test run share the files; each traces the program for itself.
    """
    builds: dict[Any, Lowered] = {}

    def make(name: str, choose: Choose, target: str = "onnx", **options: str) -> Lowered:
        key = (name, choose.__name__, target, *sorted(options.items()))
        if key not in builds:
            export_build = build_for(any_checkpoint(name), choose, target, options)
            builds[key] = lower_once(export_build, run_cache)
        return builds[key]

    return make


@pytest.fixture(scope="session")
def tiny_moe(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    """A tiny model with every kind of layer: convolutions, attention, experts."""
    return open_checkpoint(tiny_checkpoint("lfm2_moe"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_moe: Checkpoint, run_cache: RunCache) -> Callable[..., Bundle]:
    """Return `tiny_bundle(target, bits_per_weight, option=value)`: a verified export of `tiny_moe`.

    A whole export of a trained model by each target is what `make check` runs.
    """

    def export(target: str, bits_per_weight: float, **options: str) -> Bundle:
        def write(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:  # random weights need no large sample
                patch.setattr("lfmc.calib_free.auto.method.TEXTS", 8)
                patch.setattr("lfmc.calib_free.auto.method.LENGTH", 32)
                export_checked(target, folder / "bundle", bits_per_weight, tiny_moe.path, **options)

        key = (target, bits_per_weight, sorted(options.items()), tiny_moe.fingerprint)
        folder, _ = run_cache.make_once(key, write)
        return open_bundle(folder / "bundle")

    return export
