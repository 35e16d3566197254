"""fuse-gated-short-conv: the gated short convolution, with or without a state.

    bcx -> transpose -> chunk -> B, C, x
    1. with a state (the decoder of lfmc):
         inputs = cat([state, B * x])
         y = transpose(C * conv1d(inputs, w));  inputs[:, :, -(k-1):]
    2. without a state (transformers, one shot):
         y = transpose(C * conv1d(B * x, w, padding=k-1)[:, :, :T])
      ->  y, state = lfm.gated_short_conv(bcx, w, bias, state)

The input and output projections stay outside, so that they are quantized separately.
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
from lfmc.passes.pattern import ANY, Match, OneOf, Op, Var, match_pattern

_CHUNK = OneOf(
    Op("aten.chunk", Op("aten.transpose", Var("bcx"), 1, 2), 3, 1, bind="chunk"),
    Op("aten.chunk", Op("aten.transpose", Var("bcx"), -1, -2), 3, -2, bind="chunk"),
)


def _chunk(index: int) -> Op:
    return Op("getitem", _CHUNK, index)


_GATED = Op("aten.mul", _chunk(0), _chunk(2))
_INPUTS = Op("aten.cat", [Var("state"), _GATED], 2, bind="inputs")
_WEIGHT = OneOf(Op("aten.unsqueeze", Op("aten.squeeze", Var("weight"), 1), 1), Var("weight"))
_CONV_TAIL = (_WEIGHT, Var("bias"), [1], Var("padding"), [1], Var("groups"))
_STATEFUL = Op("aten.conv1d", _INPUTS, *_CONV_TAIL)
_ONE_SHOT = Op(
    "aten.slice", Op("aten.conv1d", _GATED, *_CONV_TAIL), 2, OneOf(0, None), Var("length")
)


def _pattern(conv: Op) -> OneOf:
    mixed = Op("aten.mul", _chunk(1), conv)
    return OneOf(Op("aten.transpose", mixed, 1, 2), Op("aten.transpose", mixed, -1, -2))


@dataclass(frozen=True)
class FuseGatedShortConv:
    name: ClassVar[str] = "fuse-gated-short-conv"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.transpose")):
            stateful = match_pattern(_pattern(_STATEFUL), node)
            match = stateful or match_pattern(_pattern(_ONE_SHOT), node)
            if match is None or not _is_depthwise(match, carries_state=bool(stateful)):
                continue
            if not stateful and not _keeps_length(match):
                continue
            last = _find_last_inputs(match) if stateful else None
            if stateful and last is None:
                continue
            _replace(program, node, match, last)
            changed += 1
        return changed


def _is_depthwise(match: Match, carries_state: bool) -> bool:
    weight = match.node("weight").meta["val"]
    if weight.dim() != 3 or weight.shape[1] != 1 or match["groups"] != weight.shape[0]:
        return False
    return bool(match["padding"] == [0 if carries_state else weight.shape[2] - 1])


def _keeps_length(match: Match) -> bool:
    """Return whether the slice after the padded convolution keeps exactly the `T` input steps."""
    length = match["length"]
    if isinstance(length, fx.Node):
        length = length.meta["val"]
    return statically_known_true(length == match.node("bcx").meta["val"].shape[1])


def _find_last_inputs(match: Match) -> fx.Node | None:
    """Find the slice of the filter's last `taps - 1` inputs among the users of `inputs`."""
    taps = match.node("weight").meta["val"].shape[2]
    if match.node("state").meta["val"].shape[2] != taps - 1:
        return None
    for user in match.node("inputs").users:
        if match_pattern(Op("aten.slice", ANY, 2, 1 - taps, sys.maxsize), user):
            return user
    return None


def _replace(program: Program, node: fx.Node, match: Match, last: fx.Node | None) -> None:
    bcx, weight = match.node("bcx"), match.node("weight")
    with program.graph.inserting_before(node):
        state: Any = match["state"] if last else _initial_state(program, bcx, weight)
        result = program.call(
            torch.ops.lfm.gated_short_conv.default, bcx, weight, match["bias"], state
        )
        y = program.call(operator.getitem, result, 0)
        new_state = program.call(operator.getitem, result, 1) if last else None
    program.replace(node, y)
    if last and new_state:
        program.replace(last, new_state)


def _initial_state(program: Program, bcx: fx.Node, weight: fx.Node) -> fx.Node:
    """Insert zeros `[B, H, taps - 1]`, the state before the first token."""
    channels, _, taps = weight.meta["val"].shape
    batch = bcx.meta["val"].shape[0]
    if not isinstance(batch, int):
        batch = program.call(torch.ops.aten.sym_size.int, bcx, 0)
    shape = [batch, channels, taps - 1]
    return program.call(torch.ops.aten.new_zeros.default, bcx, shape)
