"""A module for Vulkan on Mesa's software driver; skipped where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.targets.lowering import Lowered, four_bit
from tests.targets.matrix import assert_matrix

LAVAPIPE = Path("/usr/share/vulkan/icd.d/lvp_icd.x86_64.json")


@pytest.mark.skipif(not LAVAPIPE.is_file(), reason="Mesa's lavapipe is not on this machine")
def test_matrix(lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model in short chunks: larger ones are wrong there (docs/mlir.md)."""
    monkeypatch.setenv("VK_ICD_FILENAMES", str(LAVAPIPE))
    made = lowered("lfm2-untied", four_bit, "mlir", device="vulkan", chunk="16")
    if (reason := made.target.why_not_here(made.request)) is not None:
        pytest.skip(reason)
    assert_matrix(made, made.target.run(made.folder))
