"""One export of the bundled checkpoint, for all tests that need a whole bundle."""

from __future__ import annotations

import pytest

from lfmc.bundle.bundle import Bundle
from tests.targets.matrix import export_demo


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of at most 7 bits a weight, for 128 tokens in calls of up to 32."""
    output = tmp_path_factory.mktemp("executorch") / "bundle"
    return export_demo("executorch", output, 7.0, chunk="32")
