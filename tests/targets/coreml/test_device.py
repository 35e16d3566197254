"""Apple's own runtime: what only a Mac can run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.errors import UnsupportedError
from lfmc.parity import cases, compare
from lfmc.stepping import TorchStepper
from lfmc.targets.coreml.device import Device
from lfmc.targets.coreml.runtime import CoremlStepper
from tests.targets.coreml.test_parity import PACKAGES
from tests.targets.lowering import Choose, Lowered

Make = Callable[..., Lowered]


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_it_is_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Apple's systems only"):
        Device(tmp_path)


@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS 15")
@pytest.mark.parametrize(("name", "choose", "layout"), PACKAGES)
def test_matrix_on_the_device(lowered: Make, name: str, choose: Choose, layout: str) -> None:
    made = lowered(name, choose, layout, "coreml")
    config, context = made.checkpoint.config, made.request.context
    rung = compare(
        3,
        "package",
        CoremlStepper(Device(made.folder)),
        TorchStepper(made.program.module, config, context),
        cases(config, context, full=True),
        config.vocab_size,
        tolerance=2e-2,  # float16 arithmetic
    )
    assert rung.passed, rung
