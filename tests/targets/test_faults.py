"""Every seeded fault is caught by a gate, and a trace names its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.bisect import Suspect
from lfmc.checkpoint import open_checkpoint
from lfmc.choices import ChoosingStepper
from lfmc.errors import GateError
from lfmc.locate import find_place
from lfmc.parity import cases, compare
from lfmc.progress import Silent
from lfmc.readback import read_back
from lfmc.rungs import NEAR_TIE, Verification
from tests.faults import FAULTS, Fault, FaultyTarget
from tests.targets.lowering import Lowered, four_bit, lower

Right = Callable[[str, str], Lowered]


@pytest.fixture(scope="module")
def right(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Right:
    """`right(kind, target)`: what a faulty artifact is compared with, made once."""
    made: dict[tuple[str, str], Lowered] = {}

    def make(kind: str, target: str) -> Lowered:
        if (kind, target) not in made:
            checkpoint = open_checkpoint(tiny_checkpoint(kind, vocab_size=256))
            folder = tmp_path_factory.mktemp(target)
            made[kind, target] = lower(checkpoint, four_bit, folder, name=target, context=48)
        return made[kind, target]

    return make


def _id(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


WRONG = tuple(fault for fault in FAULTS if not fault.is_stored)
STORED = tuple(fault for fault in FAULTS if fault.is_stored)


def assert_caught_and_named(right: Right, fault: Fault, name: str, folder: Path) -> None:
    """The matrix of rung 3 fails, and a trace of its worst case names the operator."""
    made = right(fault.kind, name)
    target, exact = FaultyTarget(made.target, fault), made.target.exact
    target.lower(made.program, made.weights, made.request, folder)
    config, context = made.checkpoint.config, made.request.context
    matrix = cases(config, context, full=True)
    rung = compare(
        3,
        "artifact",
        made.target.run(folder, exact=exact),
        ChoosingStepper(made.reference(exact=exact), config, context),
        matrix,
        config.vocab_size,
        tolerance=made.target.tolerance(made.program, exact=exact),
        near_tie=NEAR_TIE,
    )
    assert not rung.passed
    suspect = Suspect(made.checkpoint, made.weights, made.program, target, made.request)
    place = find_place(suspect, Verification((rung,), None), Silent())
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
    assert place.difference > place.tolerance


def assert_read_back(right: Right, fault: Fault, name: str, folder: Path) -> None:
    """What is on disk is not the plan's, and the error names the tensor and its piece."""
    made = right(fault.kind, name)
    target = FaultyTarget(made.target, fault)
    artifact = target.lower(made.program, made.weights, made.request, folder)
    with pytest.raises(GateError, match=r"on disk are not the plan's") as caught:
        read_back(made.weights, made.target, folder, artifact)
    place = caught.value.place
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
    assert fault.tensor in place.name
    assert place.difference > 0


@pytest.mark.parametrize("fault", WRONG, ids=_id)
def test_onnx_computes_otherwise(right: Right, fault: Fault, tmp_path: Path) -> None:
    assert_caught_and_named(right, fault, "onnx", tmp_path)


@pytest.mark.parametrize("fault", STORED, ids=_id)
def test_onnx_stores_otherwise(right: Right, fault: Fault, tmp_path: Path) -> None:
    assert_read_back(right, fault, "onnx", tmp_path)
