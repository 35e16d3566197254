"""A module for Vulkan on Mesa's software driver; skipped if the driver is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.targets.lowering import Choose, Lowered
from tests.targets.matrix import assert_matrix
from tests.targets.programs import PROGRAMS, mostly_slow

LAVAPIPE = Path("/usr/share/vulkan/icd.d/lvp_icd.x86_64.json")


@pytest.mark.skipif(
    not LAVAPIPE.is_file(),
    reason="Mesa's lavapipe is not installed: apt-get install mesa-vulkan-drivers",
)
@pytest.mark.parametrize(("kind", "choose"), mostly_slow(PROGRAMS[:4], "lfm2_moe"))
def test_matrix(
    kind: str, choose: Choose, lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VK_ICD_FILENAMES", str(LAVAPIPE))
    build = lowered(kind, choose, "mlir", device="vulkan", chunk="16")
    if (reason := build.target.why_not_here(build.request)) is not None:
        pytest.skip(reason)
    assert_matrix(build, build.target.run(build.folder))
