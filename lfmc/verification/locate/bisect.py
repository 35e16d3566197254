"""The first operator of an artifact that differs, by bisection: cut, lower, run, compare.

A target shows nothing of what is inside of its artifacts, and need not: the program is cut at a
node, lowered by the very same verbs, and run through the case that failed. Nodes are tried as
commits are by `git bisect`: where one agrees, so does all that it hangs on; where one differs, so
does the fault lie there or before. A few lowerings find one operator among hundreds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from torch import Tensor, fx

from lfmc.errors import first_line
from lfmc.graph.program import operator_name
from lfmc.lowering.build import Build
from lfmc.machine.progress import Progress
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Case, draw_tokens, run_both, run_case
from lfmc.parity.place import Parting, Place, parting
from lfmc.run.stepper import TorchStepper, gives_last_only
from lfmc.verification.locate.cut import ancestors, cut, parts, producer, read_weights, shown_nodes

# Where a runtime rounds activations, by how much more than rounding does at all values may differ:
# two right roundings are as far apart as the square root of two.
ROUNDING = 2.0


@dataclass(frozen=True)
class Found:
    """The end of a search: the first node that differs and by how much, the last that agrees,
    and those between that could not be shown."""

    node: fx.Node
    parting: Parting
    agrees: fx.Node | None
    hidden: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Compared:
    """One cut program, run: where it parts from torch, if it does, and what was allowed."""

    parting: Parting | None
    tolerance: float
    ends: bool


class CannotShow(Exception):
    """A target has no form for a program that was cut just there."""


def find_in_artifact(
    suspect: Build, case: Case, progress: Progress, *, near_tie: float, exact: bool
) -> Place | None:
    """The first operator that the target computes otherwise than torch does; None where all agree.

    `exact` runs the artifact with float activations. Raises what the target raises for the program
    as a whole.
    """
    program, wanted = suspect.program, shown_nodes(suspect.program)
    last = wanted[-1]
    progress.step("all of it")
    whole = _compare(suspect, last, case, near_tie, exact)
    if whole.parting is None:
        return None
    compared = {last: whole}

    def differs(node: fx.Node) -> Parting | None:
        progress.step(f"{operator_name(producer(node))} ({node.name})")
        try:
            compared[node] = _compare(suspect, node, case, near_tie, exact)
        except Exception as error:  # targets' libraries raise whatever they like
            raise CannotShow(first_line(error)) from error
        return compared[node].parting

    found = first_that_differs(wanted, last, whole.parting, differs)
    result = compared[found.node]
    source = producer(found.node)
    row = found.parting.row
    ends = list(accumulate(case.calls))
    token = ends[row] - 1 if result.ends else row
    return Place(
        3,
        parts(program)[source],
        operator_name(source),
        source.name,
        found.parting.difference,
        result.tolerance,
        found.parting.corner(),
        read_weights(program, source),
        case.name,
        sum(end <= token for end in ends),
        token,
        None if found.agrees is None else producer(found.agrees).name,
        tuple(node.name for node in found.hidden),
    )


def first_that_differs(
    nodes: Sequence[fx.Node],
    last: fx.Node,
    parted: Parting,
    differs: Callable[[fx.Node], Parting | None],
) -> Found:
    """The first of `nodes`, in topological order, that differs, given that `last` does.

    `differs` compares one of them, and raises `CannotShow` where that is not possible.
    """
    before = {node: ancestors(node) & set(nodes) for node in nodes}
    left, hidden, agrees = set(before[last]), set[fx.Node](), list[fx.Node]()
    worst, partings = last, {last: parted}
    while True:
        pool = [node for node in nodes if node in left and node not in hidden and node != worst]
        if not pool:
            break
        node = max(pool, key=lambda own: min(len(before[own] & left), len(left - before[own])))
        try:
            found = differs(node)
        except CannotShow:
            hidden.add(node)
            continue
        if found is None:
            agrees.append(node)
            left -= before[node]
        else:
            worst, partings[node] = node, found
            left &= before[node]
    near = [node for node in nodes if node in agrees and node in before[worst]]
    return Found(
        worst,
        partings[worst],
        near[-1] if near else None,
        tuple(node for node in nodes if node in left and node in hidden),
    )


def _compare(suspect: Build, node: fx.Node, case: Case, near_tie: float, exact: bool) -> Compared:
    """Lower the program, cut at a node, and run the case on it and on torch."""
    vocab_size = suspect.program.config.vocab_size
    small = replace(suspect, program=cut(suspect.program, node.name))
    config = small.program.config
    # Tokens that both may be given: a target takes the width of what is shown for a vocabulary.
    drawn = draw_tokens(case.length, vocab_size)
    prompt, earlier = (ids % config.vocab_size for ids in drawn)
    with tempfile.TemporaryDirectory(prefix="lfmc-") as path:
        small.lower(Path(path))
        small.bind()
        stepper, torch_side = small.sides(Path(path), exact=exact)
        pair = run_both(stepper, torch_side, case, prompt, earlier, near_tie=near_tie)
        if pair.ours.shape != pair.theirs.shape:
            raise CannotShow(f"it gives {list(pair.ours.shape)}")
        ends = gives_last_only(stepper)
        tolerance = small.tolerance(exact=exact)
        if tolerance is None:
            plain = TorchStepper(small.program.module, config, small.asked.context)
            floats, _ = run_case(plain, case, prompt, earlier, ends=ends)
            tolerance = max(ARTIFACT_TOLERANCE, ROUNDING * _distance(floats, pair.theirs))
    found = parting(pair.ours[: pair.clear], pair.theirs[: pair.clear], tolerance)
    return Compared(found, tolerance, ends)


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))
