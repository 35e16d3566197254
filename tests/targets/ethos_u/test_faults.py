"""Seeded faults in graphs that Vela compiled: make test-ethos-u."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.lowering.build import Build, build
from lfmc.lowering.request import Options, request
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from lfmc.verification.readback import read_back
from lfmc.verification.rungs import Verification
from tests.faults.fault import FaultyTarget
from tests.faults.table import FAULTS
from tests.targets.lowering import choose_formats
from tests.targets.qualcomm.programs import eight_bit

pytestmark = pytest.mark.skipif(
    find_spec("ethosu") is None, reason="Vela is not in this environment: make test-ethos-u"
)
OPTIONS = {"accelerator": "ethos-u55-128", "activations": "int8", "chunk": "8"}


def made_of(checkpoint: Checkpoint, name: str) -> tuple[Build, FaultyTarget]:
    """What is right, and a target that lowers it with a fault."""
    target = get_target("ethos-u")
    plan = choose_formats(checkpoint, eight_bit, target.capabilities(checkpoint.config))
    asked = request(checkpoint, target, Options(context=48, target_options=OPTIONS))
    made, _ = build(checkpoint, target, plan, asked, Silent())
    made.bind()
    return made, FaultyTarget(target, next(own for own in FAULTS if own.name == name))


@pytest.mark.parametrize("name", ["w1 and w3 swapped", "q and k norms swapped"])
def test_operators_differ(
    any_checkpoint: Callable[[str], Checkpoint], name: str, tmp_path: Path
) -> None:
    made, target = made_of(any_checkpoint("lfm2"), name)
    artifact = replace(made, target=target).lower(tmp_path)
    found = made.target.operator_parity(made.program, tmp_path, artifact)
    with pytest.raises(GateError, match="rung 3 failed"):
        Verification(found, None).require()


def test_stored_scales_differ(any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    made, target = made_of(any_checkpoint("lfm2"), "scales one row off")
    artifact = replace(made, target=target).lower(tmp_path)
    with pytest.raises(GateError, match=r"on disk are not the plan's"):
        read_back(made, tmp_path, artifact)
