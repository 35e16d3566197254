"""Artifacts are made once for all tests of targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lfmc.checkpoint.checkpoint import Checkpoint
from tests.targets.lowering import Choose, Lowered, lower


@pytest.fixture(scope="session")
def lowered(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Lowered]:
    """`lowered(checkpoint name, choose, target, option=choice)`: the artifact, made once."""
    made: dict[Any, Lowered] = {}

    def make(name: str, choose: Choose, target: str = "onnx", **options: str) -> Lowered:
        key = (name, choose.__name__, target, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(target)
            checkpoint = any_checkpoint(name)
            made[key] = lower(checkpoint, choose, folder, name=target, options=options)
        return made[key]

    return make
