"""One export of the bundled checkpoint, for all tests that need a whole bundle."""

from __future__ import annotations

import pytest

from lfmc.bundle import Bundle
from lfmc.calib_free.allocate import Budget
from lfmc.checkpoint import open_checkpoint
from lfmc.exporter import Options, export
from lfmc.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of at most 7 bits a weight, for 128 tokens in calls of up to 32."""
    output = tmp_path_factory.mktemp("executorch") / "bundle"
    asked = Options(
        budget=Budget(bits_per_weight=7.0),
        context=128,
        target_options={"chunk": "32"},
        check="fast",
        cache=False,
    )
    target = get_target("executorch")
    made, report = export(open_checkpoint(), target, output, asked, force=False, progress=Silent())
    assert report.verification is not None
    assert report.nbytes <= (report.plan.limit_nbytes or 0)
    return made
