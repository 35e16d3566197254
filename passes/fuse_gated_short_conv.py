"""fuse-gated-short-conv: the gated short convolution, with or without a carried state.

    bcx -> transpose -> chunk -> B, C, x
    1. with a state (lfmc's decoder):
         seen = cat([state, B * x]);  y = transpose(C * conv1d(seen, w));  seen[:, :, -(k-1):]
    2. without one (transformers, one shot):
         y = transpose(C * conv1d(B * x, w, padding=k-1)[:, :, :T])
      ->  y, state = lfm.gated_short_conv(bcx, w, bias, state)

The projections on both sides stay outside, so that they quantize on their own.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lfmc.graph.program import Program
from lfmc.passes.pattern import ANY, Match, OneOf, Op, Var, match

_CHUNK = OneOf(
    Op("aten.chunk", Op("aten.transpose", Var("bcx"), 1, 2), 3, 1, bind="chunk"),
    Op("aten.chunk", Op("aten.transpose", Var("bcx"), -1, -2), 3, -2, bind="chunk"),
)


def _part(index: int) -> Op:
    return Op("getitem", _CHUNK, index)


_GATED = Op("aten.mul", _part(0), _part(2))
_SEEN = Op("aten.cat", [Var("state"), _GATED], 2, bind="seen")
_WEIGHT = OneOf(Op("aten.unsqueeze", Op("aten.squeeze", Var("weight"), 1), 1), Var("weight"))
_CONV_TAIL = (_WEIGHT, Var("bias"), [1], Var("padding"), [1], Var("groups"))
_STATEFUL = Op("aten.conv1d", _SEEN, *_CONV_TAIL)
_ONE_SHOT = Op(
    "aten.slice", Op("aten.conv1d", _GATED, *_CONV_TAIL), 2, OneOf(0, None), Var("length")
)


def _pattern(conv: Op) -> OneOf:
    mixed = Op("aten.mul", _part(1), conv)
    return OneOf(Op("aten.transpose", mixed, 1, 2), Op("aten.transpose", mixed, -1, -2))


@dataclass(frozen=True)
class FuseGatedShortConv:
    name: ClassVar[str] = "fuse-gated-short-conv"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.transpose")):
            stateful = match(_pattern(_STATEFUL), node)
            found = stateful or match(_pattern(_ONE_SHOT), node)
            if found is None or not _is_depthwise(found, carries_state=bool(stateful)):
                continue
            if not stateful and not _keeps_length(found):
                continue
            last = _last_inputs(found) if stateful else None
            if stateful and last is None:
                continue
            _replace(program, node, found, last)
            changed += 1
        return changed


def _is_depthwise(found: Match, carries_state: bool) -> bool:
    weight = found.node("weight").meta["val"]
    if weight.dim() != 3 or weight.shape[1] != 1 or found["groups"] != weight.shape[0]:
        return False
    return bool(found["padding"] == [0 if carries_state else weight.shape[2] - 1])


def _keeps_length(found: Match) -> bool:
    """The slice after a padded convolution cuts it to the `T` steps that came in."""
    length = found["length"]
    if isinstance(length, fx.Node):
        length = length.meta["val"]
    return statically_known_true(length == found.node("bcx").meta["val"].shape[1])


def _last_inputs(found: Match) -> fx.Node | None:
    """The slice that hands the filter's last `taps - 1` inputs on, among the users of `seen`."""
    taps = found.node("weight").meta["val"].shape[2]
    if found.node("state").meta["val"].shape[2] != taps - 1:
        return None
    for user in found.node("seen").users:
        if match(Op("aten.slice", ANY, 2, 1 - taps, sys.maxsize), user):
            return user
    return None


def _replace(program: Program, node: fx.Node, found: Match, last: fx.Node | None) -> None:
    bcx, weight = found.node("bcx"), found.node("weight")
    with program.graph.inserting_before(node):
        state: Any = found["state"] if last else _fresh_state(program, bcx, weight)
        both = program.call(
            torch.ops.lfm.gated_short_conv.default, bcx, weight, found["bias"], state
        )
        y = program.call(operator.getitem, both, 0)
        new_state = program.call(operator.getitem, both, 1) if last else None
    program.replace(node, y)
    if last and new_state:
        program.replace(last, new_state)


def _fresh_state(program: Program, bcx: fx.Node, weight: fx.Node) -> fx.Node:
    """Zeros `[B, H, taps - 1]`: what a convolution sees before the first token."""
    channels, _, taps = weight.meta["val"].shape
    batch = bcx.meta["val"].shape[0]
    if not isinstance(batch, int):
        batch = program.call(torch.ops.aten.sym_size.int, bcx, 0)
    shape = [batch, channels, taps - 1]
    return program.call(torch.ops.aten.new_zeros.default, bcx, shape)
