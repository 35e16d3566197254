"""Every seeded fault is caught by a gate, and a trace names its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import GateError
from lfmc.lowering.build import Build, build
from lfmc.lowering.request import Options, request
from lfmc.machine.progress import Silent
from lfmc.parity.compare import cases
from lfmc.parity.expert_choices import NEAR_TIE
from lfmc.targets.base import get_target
from lfmc.verification.float_twin import float_rungs
from lfmc.verification.locate.search import find_place
from lfmc.verification.readback import read_back
from lfmc.verification.rungs import Verification, artifact_rungs
from tests.faults.fault import ALL, Fault, FaultyTarget
from tests.faults.table import FAULTS, fault_table
from tests.targets.lowering import Choose, choose_formats, four_bit
from tests.targets.qualcomm.programs import both

Right = Callable[[str, str], Build]


@pytest.fixture(scope="module")
def right(tiny_checkpoint: Callable[..., Path]) -> Right:
    """`right(kind, target)`: what an artifact is lowered from and compared with, made once."""
    made: dict[tuple[str, str], Build] = {}

    def make(kind: str, name: str) -> Build:
        if (kind, name) not in made:
            checkpoint = open_checkpoint(tiny_checkpoint(kind, vocab_size=256))
            target = get_target(name)
            choose = CHOOSE.get(name, four_bit)
            plan = choose_formats(checkpoint, choose, target.capabilities(checkpoint.config))
            options = {"stage": "edge", "chunk": "16"} if name == "qualcomm" else {}
            asked = request(checkpoint, target, Options(context=48, target_options=options))
            made[kind, name], _ = build(checkpoint, target, plan, asked, Silent())
            made[kind, name].bind()
        return made[kind, name]

    return make


def signed(row: PlanRow) -> Format:
    """Four bits as XNNPACK has them: without zero points."""
    return Format(4, 32, True, "bfloat16")


CHOOSE: Mapping[str, Choose] = {"executorch": signed, "qualcomm": both}


def _id(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


WRONG = tuple(fault for fault in FAULTS if not fault.is_stored)
STORED = tuple(fault for fault in FAULTS if fault.is_stored)
# In the default suite, of targets other than ONNX; the rest is slow. MLIR compiles for long.
TYPICAL = ("w1 and w3 swapped", "rope off by one", "scales one group off")
TYPICAL_OF_MLIR = TYPICAL[1:2]


def rungs_of(made: Build, target: FaultyTarget, folder: Path) -> Verification:
    """All parts of rung 3, as an export climbs them, for an artifact with the target's fault."""
    wrong = replace(made, target=target)
    matrix = cases(made.checkpoint.config, made.asked.context, full=True)
    rungs = artifact_rungs(wrong, folder, wrong.lower(folder), matrix, Silent())
    rungs += float_rungs(wrong, matrix, Silent())
    return Verification(tuple(rungs), None)


def matrix_of(made: Build, target: FaultyTarget, folder: Path) -> Verification:
    """Of rung 3 only what has a tolerance for the whole artifact: with float activations."""
    wrong = replace(made, target=target)
    wrong.lower(folder)
    matrix = cases(made.checkpoint.config, made.asked.context, full=True)
    rung = wrong.compare("artifact", folder, matrix, Silent(), exact=True, near_tie=NEAR_TIE)
    return Verification((rung,), None)


def assert_named(made: Build, target: FaultyTarget, found: Verification) -> None:
    """A trace of what failed names the fault's operator."""
    fault = target.fault
    place = find_place(replace(made, target=target), found, Silent())
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
    assert place.difference > place.tolerance


def assert_read_back(made: Build, target: FaultyTarget, folder: Path) -> None:
    """What is on disk is not the plan's, and the error names the tensor and its piece."""
    fault = target.fault
    artifact = target.lower(made.program, made.weights, made.asked, folder)
    with pytest.raises(GateError, match=r"on disk are not the plan's") as caught:
        read_back(made, folder, artifact)
    place = caught.value.place
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
    assert fault.tensor in place.name
    assert place.difference > 0


@pytest.mark.parametrize("fault", WRONG, ids=_id)
def test_onnx_computes_otherwise(right: Right, fault: Fault, tmp_path: Path) -> None:
    made = right(fault.kind, "onnx")
    target = FaultyTarget(made.target, fault)
    found = matrix_of(made, target, tmp_path)
    assert found.failed is not None
    assert_named(made, target, found)


@pytest.mark.parametrize("fault", STORED, ids=_id)
def test_onnx_stores_otherwise(right: Right, fault: Fault, tmp_path: Path) -> None:
    made = right(fault.kind, "onnx")
    assert_read_back(made, FaultyTarget(made.target, fault), tmp_path)


def _elsewhere(faults: tuple[Fault, ...], *, slow: bool = False) -> list[Any]:
    """Every fault in every other target that can have it; typical ones are not slow, but with
    `slow`. Of MLIR, which takes minutes to trace one, those then are all."""
    found = []
    for target in sorted(ALL - {"onnx"}):
        typical = TYPICAL_OF_MLIR if target == "mlir" else TYPICAL
        for fault in faults:
            long = slow and target == "mlir" and fault.name not in TYPICAL
            if target in fault.targets and not long:
                marks = () if fault.name in typical and not slow else pytest.mark.slow
                case = f"{target}-{_id(fault)}"
                found.append(pytest.param(target, fault, id=case, marks=marks))
    return found


@pytest.mark.parametrize(("name", "fault"), _elsewhere(WRONG))
def test_computes_otherwise(right: Right, name: str, fault: Fault, tmp_path: Path) -> None:
    made = right(fault.kind, name)
    found = rungs_of(made, FaultyTarget(made.target, fault), tmp_path)
    assert found.failed is not None, found


@pytest.mark.parametrize(("name", "fault"), _elsewhere(STORED))
def test_stores_otherwise(right: Right, name: str, fault: Fault, tmp_path: Path) -> None:
    made = right(fault.kind, name)
    assert_read_back(made, FaultyTarget(made.target, fault), tmp_path)


@pytest.mark.parametrize(("name", "fault"), _elsewhere(WRONG, slow=True))
def test_is_named(right: Right, name: str, fault: Fault, tmp_path: Path) -> None:
    made = right(fault.kind, name)
    target = FaultyTarget(made.target, fault)
    assert_named(made, target, rungs_of(made, target, tmp_path))


# A program that is wired otherwise may lack a value that the right one has, or round one twice.
OTHERWISE_WIRED = (
    r"does not keep a value|tells its host is not the model's|"
    r"has no step for a value|does not round what the program rounds"
)
NOT_LOWERED = "sliding window off by one"  # the host has no such mask: there is no artifact


def _of_accelerators() -> list[Any]:
    """Every fault of what is computed; states are not written in place there, nor given back."""
    return [
        pytest.param(fault, id=_id(fault), marks=() if fault.name in TYPICAL else pytest.mark.slow)
        for fault in WRONG
        if fault.targets >= ALL - {"coreml"} and fault.name != NOT_LOWERED
    ]


@pytest.mark.parametrize("fault", _of_accelerators())
def test_an_accelerator_computes_otherwise(right: Right, fault: Fault, tmp_path: Path) -> None:
    """Values are rounded there: operators are compared one by one, each on its own inputs, and
    what the host makes of a position with what the model asks for."""
    made = right(fault.kind, "qualcomm")
    target = FaultyTarget(made.target, fault)
    refused = None
    try:
        artifact = target.lower(made.program, made.weights, made.asked, tmp_path)
        rungs = made.target.operator_parity(made.program, tmp_path, artifact)
    except GateError as error:
        refused = str(error)
    else:
        found = Verification(rungs, None)
        assert found.failed is not None
        assert_named(made, target, found)
    assert refused is None or re.search(OTHERWISE_WIRED, refused), refused


def test_the_page_has_every_fault() -> None:
    page = Path(__file__).parents[2] / "docs" / "parity.md"
    assert fault_table() in page.read_text(encoding="utf-8")
    assert len(FAULTS) > 20
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
