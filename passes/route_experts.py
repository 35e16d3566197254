"""route-experts: every expert on every token  ->  `lfm.moe`, which runs the chosen ones only.

chosen = topk(choice, k)[1]
weights = gather(scores, 1, chosen)  [/ (sum(weights) + 1e-6)]  [* scale]
shares = scatter(zeros, 1, chosen, weights)
y = zeros + w2_0(swiglu(w1_0 x, w3_0 x)) * shares[:, 0:1] + ... one term an expert
->  y = lfm.moe(x, scores, choice, [w1...], [w3...], [w2...], k, normalize, scale)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program
from lfmc.passes.pattern import ANY, Match, OneOf, Op, Var, match

_CHOSEN = Op("getitem", Op("aten.topk", Var("choice"), Var("k")), 1)
_PICKED = Op("aten.gather", Var("scores"), 1, _CHOSEN)
_SUM = Op("aten.add", Op("aten.sum", _PICKED, [-1], True), 1e-6, bind="normalized")
_WEIGHTS = OneOf(Op("aten.div", _PICKED, _SUM), _PICKED)
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
            routing = match(_SHARES, shares)
            terms = _terms(shares) if routing else []
            if routing is None or len(terms) != shares.meta["val"].shape[1]:
                continue
            total = _total([term for term, _ in terms])
            if total is None or len({found["x"] for _, found in terms}) != 1:
                continue
            if isinstance(routing.values.get("scale"), fx.Node):
                continue
            _replace(program, total, routing, [found for _, found in terms])
            changed += 1
        return changed


def _terms(shares: fx.Node) -> list[tuple[fx.Node, Match]]:
    """The weighted output of each expert, in the order of the experts; [] if one is missing."""
    terms = []
    for piece in shares.users:
        for node in piece.users:
            found = match(_TERM, node)
            if found and found["shares"] is shares and found["end"] == found["start"] + 1:
                terms.append((node, found))
    terms.sort(key=lambda term: term[1]["start"])
    complete = [found["start"] for _, found in terms] == list(range(len(terms)))
    return terms if complete else []


def _total(terms: list[fx.Node]) -> fx.Node | None:
    """The end of the chain of sums over exactly these terms, started from zeros."""
    left = set(terms)
    node = terms[0]
    start: fx.Node | None = None
    while True:
        adds = [user for user in node.users if match(Op("aten.add", ANY, ANY), user)]
        if len(node.users) != 1 or not adds:
            break
        others = [other for other in adds[0].all_input_nodes if other is not node]
        if len(others) != 1:
            break
        if others[0] in left:
            left.discard(others[0])
        elif start is None and match(Op("aten.zeros_like", ANY), others[0]):
            start = others[0]
        else:
            break
        left.discard(node)
        node = adds[0]
        if not left:
            return node if start is not None else None
    return None


def _replace(program: Program, total: fx.Node, routing: Match, experts: list[Match]) -> None:
    with program.graph.inserting_before(total):
        fused = program.call(
            torch.ops.lfm.moe.default,
            experts[0]["x"],
            routing["scores"],
            routing["choice"],
            *([found[name] for found in experts] for name in ("w1", "w3", "w2")),
            routing["k"],
            "normalized" in routing.values,
            float(routing.values.get("scale", 1.0)),
        )
    program.replace(total, fused)
