"""Artifacts are made once for all tests of the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lfmc.checkpoint import Checkpoint
from tests.targets.lowering import Choose, Lowered, lower


@pytest.fixture(scope="session")
def lowered(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Lowered]:
    """`lowered(checkpoint name, choose, layout=...)`: the artifact, made once."""
    made: dict[Any, Lowered] = {}

    def make(name: str, choose: Choose, layout: str = "plain") -> Lowered:
        key = (name, choose.__name__, layout)
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            made[key] = lower(any_checkpoint(name), choose, folder, layout=layout)
        return made[key]

    return make
