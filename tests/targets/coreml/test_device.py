"""Parity by Apple's own runtime, on a Mac only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.errors import UnsupportedError
from lfmc.targets.coreml.device import Device
from lfmc.targets.coreml.runtime import CoremlStepper
from tests.targets.coreml.packages import FLOAT16, PACKAGES, matrix_rung
from tests.targets.lowering import Choose, Lowered

Make = Callable[..., Lowered]


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_other_systems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Apple's systems only"):
        Device(tmp_path)


@pytest.mark.skipif(sys.platform != "darwin", reason="run it on a Mac with macOS 15")
@pytest.mark.parametrize(("name", "choose", "options"), PACKAGES)
def test_matrix_on_the_device(
    lowered: Make, name: str, choose: Choose, options: dict[str, str]
) -> None:
    build = lowered(name, choose, "coreml", **options)
    rung = matrix_rung(build, CoremlStepper(Device(build.folder)), FLOAT16)
    assert rung.passed, rung
