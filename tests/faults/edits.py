"""What faults do to a program, and to tensors on their way into an artifact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.graph.program import Program
from lfmc.model import Rope
from lfmc.verification.locate.cut import parts, read_weights
from tests.faults.fault import Edit


def calls(program: Program, operator: str, part: str, reads: str = "") -> list[fx.Node]:
    """Calls of an operator in a part of the model that read a weight of such a name."""
    where = parts(program)
    return [
        node
        for node in program.nodes(operator)
        if where[node] == part and reads in " ".join(read_weights(program, node))
    ]


def with_argument(operator: str, part: str, place: int, value: Any, reads: str = "") -> Edit:
    """An edit that gives calls another argument; a function makes it from the node."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part, reads):
            new = value(node) if callable(value) else value
            node.args = (*node.args[:place], new, *node.args[place + 1 :])

    return edit


def exchanged(operator: str, part: str, first: int, second: int) -> Edit:
    """An edit that exchanges two arguments."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part):
            args = list(node.args)
            args[first], args[second] = args[second], args[first]
            node.args = tuple(args)

    return edit


def skipped(operator: str, part: str, reads: str = "") -> Edit:
    """An edit that puts an operator's first input in place of its result."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part, reads):
            node.replace_all_uses_with(node.args[0])

    return edit


class _OneStepOn(float):
    """A rotary base whose powers are those of the next pair of dims."""

    def __pow__(self, steps: Any) -> Any:
        return float(self) ** (steps + steps[1])


def rope_off_by_one(program: Program) -> None:
    ropes = {
        kind: Rope(_OneStepOn(rope.theta), rope.partial)
        for kind, rope in program.config.rope.items()
    }
    program.config = replace(program.config, rope=ropes)


def states_of(program: Program, kind: str) -> list[int]:
    """Places of the states of a kind among the outputs."""
    return [1 + at for at, spec in enumerate(program.states) if spec.kind == kind]


def stale_state(kind: str) -> Edit:
    """An edit that gives the first state of a kind back as it came."""

    def edit(program: Program) -> None:
        output = program.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        given = program.inputs[2:]
        place = states_of(program, kind)[0]
        state = given[place - 1]
        with program.graph.inserting_before(output):
            results[place] = program.call(torch.ops.aten.view_as.default, state, state)
        output.args = (results,)

    return edit


def states_exchanged(program: Program) -> None:
    output = program.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    first, second = states_of(program, "conv")[:2]
    results[first], results[second] = results[second], results[first]
    output.args = (results,)


def raw_gate(program: Program) -> None:
    for node in calls(program, "aten.sigmoid", "layer 1"):
        node.replace_all_uses_with(node.args[0])


def gain_of_another_layer(program: Program) -> None:
    others = calls(program, "lfm.add_rms_norm", "layer 1", "ffn_norm")
    for node in calls(program, "lfm.add_rms_norm", "layer 2", "ffn_norm"):
        node.args = (*node.args[:2], others[0].args[2], *node.args[3:])


def roll_scales(packed: PackedTensor) -> PackedTensor:
    return replace(packed, scales=packed.scales.roll(1, dims=1))


def turn_groups(packed: PackedTensor) -> PackedTensor:
    groups = packed.codes.unflatten(1, (packed.scales.shape[1], -1))
    return replace(packed, codes=groups.flip(1).flatten(1))


def no_zero_point(packed: PackedTensor) -> PackedTensor:
    if packed.zeros is None:
        return packed
    return replace(packed, zeros=torch.full_like(packed.zeros, 1 << (packed.format.bits - 1)))


def swap_nibbles(packed: PackedTensor) -> PackedTensor:
    return replace(packed, codes=packed.codes.unflatten(1, (-1, 2)).flip(-1).flatten(1))


def scale_of_next_row(packed: PackedTensor) -> PackedTensor:
    return replace(packed, scales=packed.scales.roll(1, dims=0))


def experts_exchanged(sources: tuple[str, ...]) -> tuple[str, ...]:
    turn = {".experts.0.": ".experts.1.", ".experts.1.": ".experts.0."}
    return tuple(
        next((name.replace(old, new) for old, new in turn.items() if old in name), name)
        for name in sources
    )


def in_other_order(sources: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(reversed(sources)) if "q_proj" in sources[0] else sources


def turn_sign(packed: PackedTensor) -> PackedTensor:
    return replace(packed, codes=packed.codes ^ (1 << (packed.format.bits - 1)))


def softmax_router(program: Program) -> None:
    for node in calls(program, "aten.sigmoid", "layer 2"):
        with program.graph.inserting_after(node):
            program.replace(node, program.call(torch.ops.aten.softmax.int, node.args[0], -1))
