"""When parity fails: the first place that differs, on the rung that failed."""

from __future__ import annotations

from lfmc.graph.program import Program, operator_name
from lfmc.lowering.build import Build
from lfmc.machine.progress import Progress
from lfmc.parity.compare import Case, CaseResult, Rung, cases
from lfmc.parity.expert_choices import NEAR_TIE, NEAR_TIE_SHIPPED
from lfmc.parity.place import Place
from lfmc.verification.float_twin import float_version
from lfmc.verification.locate.bisect import find_in_artifact
from lfmc.verification.locate.cut import parts, read_weights
from lfmc.verification.locate.diverge import find_in_decoder, find_in_passes
from lfmc.verification.rungs import Verification

NOTHING = (
    "what this version of lfmc lowers from the same weights agrees with torch everywhere: the "
    "artifact was made by another version, or its files were changed"
)


def find_place(suspect: Build, verification: Verification, progress: Progress) -> Place | None:
    """The first place that differs on the first rung that failed; None where none has failed.

    Takes a lowering for each step of a bisection: minutes for a large model.
    """
    failed = verification.failed
    if failed is None:
        return None
    case = _worst(failed, cases(suspect.checkpoint.config, suspect.asked.context, full=True))
    with progress.stage("trace"):
        if failed.number == 1:
            found = find_in_decoder(suspect, case, progress)
        elif failed.number == 2:
            found = find_in_passes(suspect, case, progress)
        elif failed.first is not None:
            found = _compared_alone(suspect.program, failed.first)
        else:
            found = _in_artifact(suspect, case, progress)
    if found is not None:
        return found
    worst = failed.worst if failed.worst is not None else float("inf")
    tolerance = 0.0 if failed.tolerance is None else failed.tolerance
    note = NOTHING if failed.number == 3 else "each part alone agrees: only their sum differs"
    return Place(
        failed.number, "file", "logits", failed.title, worst, tolerance, case=case.name, note=note
    )


def _worst(failed: Rung, matrix: tuple[Case, ...]) -> Case:
    """The case that differs most; for a rung that compares operators, the first of the matrix."""
    worst = max(failed.cases, key=lambda case: case.difference).case
    return next((case for case in matrix if case.name == worst), matrix[0])


def _compared_alone(program: Program, first: CaseResult) -> Place:
    """The operator whose value a target compared by itself, named by its node, or by the state that
    it adds to; the value, where no operator computes it."""
    name = first.case.partition(".")[0]
    states = zip(program.states, program.inputs[2:], strict=True)
    adding = [user for own, state in states if own.identifier == name for user in state.users]
    found = [node for node in program.graph.nodes if node.name == name] + adding
    note = f"{first.case}, of the artifact's own inputs; in steps over what is allowed"
    if not found:
        return Place(3, "file", "value", first.case, first.difference, 1.0, note=note)
    node = found[0]
    where, reads = parts(program)[node], read_weights(program, node)
    given = operator_name(node), node.name, first.difference, 1.0
    return Place(3, where, *given, weights=reads, note=note)


def _in_artifact(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """With float activations first, or float matrices: these leave no doubt."""
    target = suspect.target
    tries = [(suspect, exact) for exact in ((True, False) if target.exact else (False,))]
    floats = float_version(suspect)
    if floats is not None:
        floats.bind()
        tries.insert(0, (floats, target.exact))
    for own, exact in tries:
        near_tie = NEAR_TIE_SHIPPED if own is suspect and not exact else NEAR_TIE
        found = find_in_artifact(own, case, progress, near_tie=near_tie, exact=exact)
        if found is not None:
            return found
    return None
