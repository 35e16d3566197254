"""Finds the first wrong operator of an artifact by bisection: cut, lower, run, compare.

A target does not expose intermediate values of its artifacts. So the program is cut at a node,
lowered by the same methods of the target, and run through the case that failed. Nodes are tried as
`git bisect` tries commits: if a node agrees, all its ancestors are right; if it differs, the error
is in the node or in an ancestor. A few lowerings find one operator among hundreds.
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
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Case, draw_tokens, run_pairs
from lfmc.parity.place import Mismatch, Place, find_mismatch
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.verification.locate.cut import (
    ancestors,
    cut,
    observable_nodes,
    parts_by_node,
    producing_node,
    source_tensors,
)

# If a runtime rounds activations, a value may differ by this many times the effect of rounding. The
# results of two correct roundings differ by the square root of two times that effect.
ROUNDING_FACTOR = 2.0


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: the first node that differs, and the last node that agrees.

    `hidden` are the nodes in between that the target could not lower.
    """

    node: fx.Node
    mismatch: Mismatch
    agrees: fx.Node | None
    hidden: tuple[fx.Node, ...]


@dataclass(frozen=True)
class CutComparison:
    """A cut program compared with torch; `mismatch` is None if they agree within `tolerance`.

    `last_only`: the stepper returns the values of a call's last token only.
    """

    mismatch: Mismatch | None
    tolerance: float
    last_only: bool


class CannotLowerCut(Exception):
    """The target can't lower the program that was cut at this node."""


def find_in_artifact(
    suspect: Build, case: Case, progress: Progress, *, near_tie: float, exact: bool
) -> Place | None:
    """Return the first operator whose result differs from torch's; None if all operators agree.

    `exact` runs the artifact with float activations. If the whole program can't be lowered or
    run, the target's error is raised unchanged.
    """
    program, nodes = suspect.program, observable_nodes(suspect.program)
    last = nodes[-1]
    progress.step("the whole program")
    last_comparison = _compare_cut(suspect, last, case, near_tie, exact)
    if last_comparison.mismatch is None:
        return None
    comparisons = {last: last_comparison}

    def compare_node(node: fx.Node) -> Mismatch | None:
        progress.step(f"{operator_name(producing_node(node))} ({node.name})")
        try:
            comparisons[node] = _compare_cut(suspect, node, case, near_tie, exact)
        except Exception as error:  # the libraries of targets may raise anything
            raise CannotLowerCut(first_line(error)) from error
        return comparisons[node].mismatch

    result = find_first_mismatch(nodes, last, last_comparison.mismatch, compare_node)
    comparison = comparisons[result.node]
    operator = producing_node(result.node)
    row = result.mismatch.row
    call_ends = list(accumulate(case.calls))
    token = call_ends[row] - 1 if comparison.last_only else row
    return Place(
        3,
        parts_by_node(program)[operator],
        operator_name(operator),
        operator.name,
        result.mismatch.difference,
        comparison.tolerance,
        result.mismatch.corner(),
        source_tensors(program, operator),
        case.name,
        sum(end <= token for end in call_ends),
        token,
        None if result.agrees is None else producing_node(result.agrees).name,
        tuple(node.name for node in result.hidden),
    )


def find_first_mismatch(
    nodes: Sequence[fx.Node],
    last: fx.Node,
    last_mismatch: Mismatch,
    compare_node: Callable[[fx.Node], Mismatch | None],
) -> SearchResult:
    """Return the first of `nodes`, in topological order, that differs, given that `last` differs.

    `compare_node` compares one node, and raises `CannotLowerCut` if that is not possible.
    """
    ancestors_by_node = {node: ancestors(node) & set(nodes) for node in nodes}
    candidates, hidden = set(ancestors_by_node[last]), set[fx.Node]()
    agreeing = list[fx.Node]()
    first, mismatches = last, {last: last_mismatch}
    while True:
        pool = [
            node for node in nodes if node in candidates and node not in hidden and node != first
        ]
        if not pool:
            break
        node = max(pool, key=lambda n: _split_size(candidates, ancestors_by_node[n]))
        try:
            mismatch = compare_node(node)
        except CannotLowerCut:
            hidden.add(node)
            continue
        if mismatch is None:
            agreeing.append(node)
            candidates -= ancestors_by_node[node]
        else:
            first, mismatches[node] = node, mismatch
            candidates &= ancestors_by_node[node]
    agreeing_inputs = [
        node for node in nodes if node in agreeing and node in ancestors_by_node[first]
    ]
    return SearchResult(
        first,
        mismatches[first],
        agreeing_inputs[-1] if agreeing_inputs else None,
        tuple(node for node in nodes if node in candidates and node in hidden),
    )


def _split_size(candidates: set[fx.Node], before: set[fx.Node]) -> int:
    """Return the number of candidates that a comparison excludes in its worse outcome."""
    return min(len(before & candidates), len(candidates - before))


def _compare_cut(
    suspect: Build, node: fx.Node, case: Case, near_tie: float, exact: bool
) -> CutComparison:
    """Lower the program cut at a node, and run the case on the artifact and in torch."""
    vocab_size = suspect.program.config.vocab_size
    cut_build = replace(suspect, program=cut(suspect.program, node.name))
    config = cut_build.program.config
    # The target uses the width of the cut value as the vocabulary size: keep token ids below it.
    prompt, earlier = (ids % config.vocab_size for ids in draw_tokens(case.length, vocab_size))
    with tempfile.TemporaryDirectory(prefix="lfmc-") as path:
        cut_build.lower(Path(path))
        artifact, reference = cut_build.open_models(Path(path), exact=exact)
        conversation = case.conversation(prompt, earlier)
        (pair,) = run_pairs(artifact, reference, [conversation], near_tie=near_tie)
        if pair.actual.shape != pair.expected.shape:
            raise CannotLowerCut(f"the result has shape {list(pair.actual.shape)}")
        tolerance = cut_build.tolerance(exact=exact)
        if tolerance is None:
            floats = LayerwiseProgram(cut_build.program, cut_build.request.context)
            (unrounded,) = run_pairs(artifact, floats, [conversation])
            rounding = _distance(unrounded.expected, pair.expected)
            tolerance = max(ARTIFACT_TOLERANCE, ROUNDING_FACTOR * rounding)
    mismatch = find_mismatch(pair.actual[: pair.clear], pair.expected[: pair.clear], tolerance)
    return CutComparison(mismatch, tolerance, artifact.last_only)


def _distance(actual: Tensor, reference: Tensor) -> float:
    return float((actual - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
