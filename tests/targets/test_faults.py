"""Every seeded fault is caught by a gate, and a trace names its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.bisect import Suspect, find_in_artifact
from lfmc.checkpoint import open_checkpoint
from lfmc.choices import ChoosingStepper
from lfmc.parity import cases, compare
from lfmc.progress import Silent
from lfmc.rungs import NEAR_TIE
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


@pytest.mark.parametrize("fault", FAULTS, ids=_id)
def test_onnx(right: Right, fault: Fault, tmp_path: Path) -> None:
    made = right(fault.kind, "onnx")
    target = FaultyTarget(made.target, fault)
    target.lower(made.program, made.weights, made.request, tmp_path)
    config, context = made.checkpoint.config, made.request.context
    matrix = cases(config, context, full=True)
    rung = compare(
        3,
        "artifact",
        made.target.run(tmp_path, exact=True),
        ChoosingStepper(made.reference(exact=True), config, context),
        matrix,
        config.vocab_size,
        tolerance=made.target.tolerance(made.program, exact=True),
        near_tie=NEAR_TIE,
    )
    assert not rung.passed
    worst = max(rung.cases, key=lambda case: case.difference).case
    case = next(case for case in matrix if case.name == worst)
    suspect = Suspect(made.checkpoint, made.weights, made.program, target, made.request)
    place = find_in_artifact(suspect, case, Silent(), near_tie=NEAR_TIE, exact=True)
    assert place is not None
    assert (place.part, place.operator) == (fault.part, fault.operator), place
