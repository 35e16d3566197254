"""route-experts: every expert on every token  ->  `lfm.moe`, which runs only the chosen experts.

chosen = topk(choice, k)[1]
weights = gather(scores, 1, chosen)  [/ (sum(weights) + 1e-6)]  [* scale]
shares = scatter(zeros, 1, chosen, weights)
y = zeros + w2_0(swiglu(w1_0 x, w3_0 x)) * shares[:, 0:1] + ... one term per expert
->  y = lfm.moe(x, scores, choice, [w1...], [w3...], [w2...], k, normalize, scale)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program
from lfmc.passes.pattern import ANY, Match, OneOf, Op, Var, match_pattern

_CHOSEN = Op("getitem", Op("aten.topk", Var("choice"), Var("k")), 1)
_CHOSEN_SCORES = Op("aten.gather", Var("scores"), 1, _CHOSEN)
_SUM = Op("aten.add", Op("aten.sum", _CHOSEN_SCORES, [-1], True), 1e-6, bind="normalized")
_WEIGHTS = OneOf(Op("aten.div", _CHOSEN_SCORES, _SUM), _CHOSEN_SCORES)
_SHARES = Op(
    "aten.scatter",
    Op("aten.new_zeros", ANY, ANY),
    1,
    _CHOSEN,
    OneOf(_WEIGHTS, Op("aten.mul", _WEIGHTS, Var("scale"))),
    bind="shares",
)
_EXPERT = Op(
    "aten.linear",
    Op(
        "lfm.swiglu",
        Op("aten.linear", Var("x"), Var("w1")),
        Op("aten.linear", Var("x"), Var("w3")),
    ),
    Var("w2"),
)
_TERM = Op("aten.mul", _EXPERT, Op("aten.slice", Var("shares"), 1, Var("start"), Var("end")))


@dataclass(frozen=True)
class RouteExperts:
    name: ClassVar[str] = "route-experts"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for shares in list(program.nodes("aten.scatter")):
            routing = match_pattern(_SHARES, shares)
            terms = _expert_terms(shares) if routing else []
            if routing is None or len(terms) != shares.meta["val"].shape[1]:
                continue
            total = _end_of_sum([term for term, _ in terms])
            if total is None or len({match["x"] for _, match in terms}) != 1:
                continue
            if isinstance(routing.values.get("scale"), fx.Node):
                continue
            _replace(program, total, routing, [match for _, match in terms])
            changed += 1
        return changed


def _expert_terms(shares: fx.Node) -> list[tuple[fx.Node, Match]]:
    """Return the weighted output of each expert, ordered by expert; [] if one is missing."""
    terms = []
    for share in shares.users:
        for node in share.users:
            match = match_pattern(_TERM, node)
            if match and match["shares"] is shares and match["end"] == match["start"] + 1:
                terms.append((node, match))
    terms.sort(key=lambda term: term[1]["start"])
    complete = [match["start"] for _, match in terms] == list(range(len(terms)))
    return terms if complete else []


def _end_of_sum(terms: list[fx.Node]) -> fx.Node | None:
    """Return the end of the chain that adds exactly these terms to zeros, or None."""
    remaining = set(terms)
    node = terms[0]
    start: fx.Node | None = None
    while True:
        adds = [user for user in node.users if match_pattern(Op("aten.add", ANY, ANY), user)]
        if len(node.users) != 1 or not adds:
            break
        operands = [operand for operand in adds[0].all_input_nodes if operand is not node]
        if len(operands) != 1:
            break
        if operands[0] in remaining:
            remaining.discard(operands[0])
        elif start is None and match_pattern(Op("aten.zeros_like", ANY), operands[0]):
            start = operands[0]
        else:
            break
        remaining.discard(node)
        node = adds[0]
        if not remaining:
            return node if start is not None else None
    return None


def _replace(program: Program, total: fx.Node, routing: Match, matches: list[Match]) -> None:
    with program.graph.inserting_before(total):
        fused = program.call(
            torch.ops.lfm.moe.default,
            matches[0]["x"],
            routing["scores"],
            routing["choice"],
            *([match[name] for match in matches] for name in ("w1", "w3", "w2")),
            routing["k"],
            "normalized" in routing.values,
            float(routing.values.get("scale", 1.0)),
        )
    program.replace(total, fused)
