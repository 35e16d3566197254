"""Finds the first place that differs, on the rung that failed."""

from __future__ import annotations

from lfmc.graph.program import Program, operator_name
from lfmc.lowering.build import Build
from lfmc.machine.progress import Progress
from lfmc.parity.compare import Case, CaseResult, Rung, cases
from lfmc.parity.expert_choices import NEAR_TIE, NEAR_TIE_SHIPPED
from lfmc.parity.place import Place
from lfmc.verification.float_twin import dequantized_build
from lfmc.verification.locate.bisect import find_in_artifact
from lfmc.verification.locate.cut import parts_by_node, source_tensors
from lfmc.verification.locate.diverge import find_in_decoder, find_in_passes
from lfmc.verification.rungs import Verification

NO_DIFFERENCE = (
    "this version of lfmc lowers the same weights to an artifact that agrees with torch: the "
    "tested artifact was made by another version, or its files were changed"
)


def find_place(suspect: Build, verification: Verification, progress: Progress) -> Place | None:
    """Return the first place that differs on the first failed rung; None if no rung failed.

    Every step of a bisection lowers the program once: minutes for a large model.
    """
    failed = verification.failed
    if failed is None:
        return None
    case = _worst_case(failed, cases(suspect.checkpoint.config, suspect.request.context, full=True))
    with progress.stage("trace"):
        if failed.number == 1:
            place = find_in_decoder(suspect, case, progress)
        elif failed.number == 2:
            place = find_in_passes(suspect, case, progress)
        elif failed.first is not None:
            place = _place_of_operator(suspect.program, failed.first)
        else:
            place = _search_artifact(suspect, case, progress)
    if place is not None:
        return place
    worst = failed.worst if failed.worst is not None else float("inf")
    tolerance = 0.0 if failed.tolerance is None else failed.tolerance
    note = NO_DIFFERENCE if failed.number == 3 else "every part agrees; only the logits differ"
    return Place(
        failed.number, "file", "logits", failed.title, worst, tolerance, case=case.name, note=note
    )


def _worst_case(failed: Rung, matrix: tuple[Case, ...]) -> Case:
    """Return the worst case; for a rung that compares operators, the first case of the matrix."""
    worst = max(failed.cases, key=lambda case: case.difference).case
    return next((case for case in matrix if case.name == worst), matrix[0])


def _place_of_operator(program: Program, first: CaseResult) -> Place:
    """Return the place of an operator that the target compared separately.

    `first.case` starts with the name of the operator's node, or of a state that it writes. If no
    operator matches, the place is the value itself.
    """
    name = first.case.partition(".")[0]
    states = zip(program.states, program.inputs[2:], strict=True)
    users = [user for state, value in states if state.identifier == name for user in value.users]
    nodes = [node for node in program.graph.nodes if node.name == name] + users
    note = f"{first.case}, on the artifact's own inputs; in steps, over the allowed difference"
    if not nodes:
        return Place(3, "file", "value", first.case, first.difference, 1.0, note=note)
    node = nodes[0]
    part, weights = parts_by_node(program)[node], source_tensors(program, node)
    operator = operator_name(node)
    return Place(3, part, operator, node.name, first.difference, 1.0, weights=weights, note=note)


def _search_artifact(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Search float matrices and float activations first, because these have no rounding."""
    target = suspect.target
    candidates = [(suspect, exact) for exact in ((True, False) if target.exact else (False,))]
    float_build = dequantized_build(suspect)
    if float_build is not None:
        candidates.insert(0, (float_build, target.exact))
    for candidate, exact in candidates:
        near_tie = NEAR_TIE_SHIPPED if candidate is suspect and not exact else NEAR_TIE
        place = find_in_artifact(candidate, case, progress, near_tie=near_tie, exact=exact)
        if place is not None:
            return place
    return None
