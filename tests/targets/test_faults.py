"""A gate catches every seeded fault, and a trace names the faulty operator."""

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
from lfmc.lowering.request import Options, make_request
from lfmc.machine.progress import Silent
from lfmc.parity.compare import cases
from lfmc.parity.expert_choices import NEAR_TIE
from lfmc.targets.base import get_target
from lfmc.verification.float_twin import run_float_rungs
from lfmc.verification.locate.search import find_place
from lfmc.verification.readback import read_back
from lfmc.verification.rungs import Verification, run_artifact_rungs
from tests.faults.fault import ALL, Fault, FaultyTarget
from tests.faults.table import FAULTS, fault_table
from tests.targets.lowering import Choose, choose_formats, four_bit
from tests.targets.qualcomm.programs import mixed_bits

MakeBuild = Callable[[str, str], Build]


@pytest.fixture(scope="module")
def make_build(tiny_checkpoint: Callable[..., Path]) -> MakeBuild:
    """Return `make_build(kind, target)`, which caches builds without a fault."""
    builds: dict[tuple[str, str], Build] = {}

    def make(kind: str, name: str) -> Build:
        if (kind, name) not in builds:
            checkpoint = open_checkpoint(tiny_checkpoint(kind, vocab_size=256))
            target = get_target(name)
            choose = CHOOSE.get(name, four_bit)
            plan = choose_formats(checkpoint, choose, target.capabilities(checkpoint.config))
            options = {"stage": "edge", "chunk": "16"} if name == "qualcomm" else {}
            request = make_request(checkpoint, target, Options(context=48, target_options=options))
            builds[kind, name], _ = build(checkpoint, target, plan, request, Silent())
        return builds[kind, name]

    return make


def signed(row: PlanRow) -> Format:
    """Four bits in XNNPACK's format, which has no zero points."""
    return Format(4, 32, True, "bfloat16")


CHOOSE: Mapping[str, Choose] = {"executorch": signed, "qualcomm": mixed_bits}


def _id(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


COMPUTED = tuple(fault for fault in FAULTS if not fault.is_stored)
STORED = tuple(fault for fault in FAULTS if fault.is_stored)
# The faults of the default suite for targets other than ONNX. The others are slow tests, because
# they compile or trace for long.
TYPICAL = ("w1 and w3 swapped", "rope off by one", "scales one group off")
TYPICAL_OF_MLIR = TYPICAL[1:2]


def run_rungs(export_build: Build, target: FaultyTarget, folder: Path) -> Verification:
    """Run all parts of rung 3, as an export does, on an artifact with the target's fault."""
    wrong = replace(export_build, target=target)
    matrix = cases(export_build.checkpoint.config, export_build.request.context, full=True)
    rungs = run_artifact_rungs(wrong, folder, wrong.lower(folder), matrix)
    rungs += run_float_rungs(wrong, matrix)
    return Verification(tuple(rungs), None)


def run_matrix(export_build: Build, target: FaultyTarget, folder: Path) -> Verification:
    """Run only the part of rung 3 with a tolerance for logits, which has float activations."""
    wrong = replace(export_build, target=target)
    wrong.lower(folder)
    matrix = cases(export_build.checkpoint.config, export_build.request.context, full=True)
    rung = wrong.compare("artifact", folder, matrix, exact=True, near_tie=NEAR_TIE)
    return Verification((rung,), None)


def assert_traced(export_build: Build, target: FaultyTarget, verification: Verification) -> None:
    """A trace of the failed rung names the operator with the fault."""
    fault = target.fault
    place = find_place(replace(export_build, target=target), verification, Silent())
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
    assert place.difference > place.tolerance


def assert_readback_fails(export_build: Build, target: FaultyTarget, folder: Path) -> None:
    """Readback finds bytes that differ from the plan, and names the tensor and its part."""
    fault = target.fault
    artifact = target.lower(
        export_build.program, export_build.weights, export_build.request, folder
    )
    with pytest.raises(GateError, match=r"on disk differ from the plan") as error:
        read_back(export_build, folder, artifact)
    place = error.value.place
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
    assert fault.tensor in place.name
    assert place.difference > 0


@pytest.mark.parametrize("fault", COMPUTED, ids=_id)
def test_onnx_computation_faults_are_traced(
    make_build: MakeBuild, fault: Fault, tmp_path: Path
) -> None:
    export_build = make_build(fault.kind, "onnx")
    target = FaultyTarget(export_build.target, fault)
    verification = run_matrix(export_build, target, tmp_path)
    assert verification.failed is not None
    assert_traced(export_build, target, verification)


@pytest.mark.parametrize("fault", STORED, ids=_id)
def test_onnx_storage_faults_fail_readback(
    make_build: MakeBuild, fault: Fault, tmp_path: Path
) -> None:
    export_build = make_build(fault.kind, "onnx")
    assert_readback_fails(export_build, FaultyTarget(export_build.target, fault), tmp_path)


def _other_targets(faults: tuple[Fault, ...], *, slow: bool = False) -> list[Any]:
    """Return every fault for every other target that can have it, as test parameters.

    Typical faults are not marked slow, unless `slow` is set. With `slow`, MLIR gets only the
    typical faults, because one trace takes minutes there.
    """
    parameters = []
    for target in sorted(ALL - {"onnx"}):
        typical = TYPICAL_OF_MLIR if target == "mlir" else TYPICAL
        for fault in faults:
            takes_minutes = slow and target == "mlir" and fault.name not in TYPICAL
            if target in fault.targets and not takes_minutes:
                marks = () if fault.name in typical and not slow else pytest.mark.slow
                case = f"{target}-{_id(fault)}"
                parameters.append(pytest.param(target, fault, id=case, marks=marks))
    return parameters


@pytest.mark.parametrize(("name", "fault"), _other_targets(COMPUTED))
def test_computation_faults_fail_rung_3(
    make_build: MakeBuild, name: str, fault: Fault, tmp_path: Path
) -> None:
    export_build = make_build(fault.kind, name)
    verification = run_rungs(export_build, FaultyTarget(export_build.target, fault), tmp_path)
    assert verification.failed is not None, verification


@pytest.mark.parametrize(("name", "fault"), _other_targets(STORED))
def test_storage_faults_fail_readback(
    make_build: MakeBuild, name: str, fault: Fault, tmp_path: Path
) -> None:
    export_build = make_build(fault.kind, name)
    assert_readback_fails(export_build, FaultyTarget(export_build.target, fault), tmp_path)


@pytest.mark.parametrize(("name", "fault"), _other_targets(COMPUTED, slow=True))
def test_computation_faults_are_traced(
    make_build: MakeBuild, name: str, fault: Fault, tmp_path: Path
) -> None:
    export_build = make_build(fault.kind, name)
    target = FaultyTarget(export_build.target, fault)
    assert_traced(export_build, target, run_rungs(export_build, target, tmp_path))


# A program with different edges may lack a value of the right program, or round a value twice.
LOWERING_ERRORS = (
    r"lacks a value of the program|for its host are not those of the model|"
    r"has no step for a value|quantizes another number of values"
)
NOT_LOWERED = "sliding window off by one"  # the host has no such mask, so there is no artifact


def _of_accelerators() -> list[Any]:
    """Return every computation fault, except those of states, which the host updates there."""
    return [
        pytest.param(fault, id=_id(fault), marks=() if fault.name in TYPICAL else pytest.mark.slow)
        for fault in COMPUTED
        if fault.targets >= ALL - {"coreml"} and fault.name != NOT_LOWERED
    ]


@pytest.mark.parametrize("fault", _of_accelerators())
def test_computation_faults_of_an_accelerator_are_traced(
    make_build: MakeBuild, fault: Fault, tmp_path: Path
) -> None:
    """Accelerators round values, so parity compares operators one by one on their own inputs.

    It also compares the host's angles and masks of a position with those of the model.
    """
    export_build = make_build(fault.kind, "qualcomm")
    target = FaultyTarget(export_build.target, fault)
    error_message = None
    try:
        artifact = target.lower(
            export_build.program, export_build.weights, export_build.request, tmp_path
        )
        rungs = export_build.target.operator_parity(export_build.program, tmp_path, artifact)
    except GateError as error:
        error_message = str(error)
    else:
        verification = Verification(rungs, None)
        assert verification.failed is not None
        assert_traced(export_build, target, verification)
    assert error_message is None or re.search(LOWERING_ERRORS, error_message), error_message


def test_the_parity_page_lists_every_fault() -> None:
    page = Path(__file__).parents[2] / "docs" / "parity.md"
    assert fault_table() in page.read_text(encoding="utf-8")
    assert len(FAULTS) > 20
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
