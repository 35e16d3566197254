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
from lfmc.lowering.request import Options, make_request
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


def build_with_fault(checkpoint: Checkpoint, name: str) -> tuple[Build, FaultyTarget]:
    """Return a build without a fault, and a target that lowers it with a fault."""
    target = get_target("ethos-u")
    plan = choose_formats(checkpoint, eight_bit, target.capabilities(checkpoint.config))
    request = make_request(checkpoint, target, Options(context=48, target_options=OPTIONS))
    export_build, _ = build(checkpoint, target, plan, request, Silent())
    return export_build, FaultyTarget(target, next(fault for fault in FAULTS if fault.name == name))


@pytest.mark.parametrize("name", ["w1 and w3 swapped", "q and k norms swapped"])
def test_computation_faults_fail_the_operator_rung(
    any_checkpoint: Callable[[str], Checkpoint], name: str, tmp_path: Path
) -> None:
    export_build, target = build_with_fault(any_checkpoint("lfm2"), name)
    artifact = replace(export_build, target=target).lower(tmp_path)
    rungs = export_build.target.operator_parity(export_build.program, tmp_path, artifact)
    with pytest.raises(GateError, match="rung 3 failed"):
        Verification(rungs, None).require()


def test_wrong_scales_fail_readback(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    export_build, target = build_with_fault(any_checkpoint("lfm2"), "scales one row off")
    artifact = replace(export_build, target=target).lower(tmp_path)
    with pytest.raises(GateError, match=r"on disk differ from the plan"):
        read_back(export_build, tmp_path, artifact)
