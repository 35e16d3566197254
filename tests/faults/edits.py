"""Edits that make faults in a program, and in tensors before an artifact stores them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.graph.program import Program
from lfmc.model import Rope
from lfmc.verification.locate.cut import parts_by_node, source_tensors
from tests.faults.fault import Edit


def calls(program: Program, operator: str, part: str, reads: str = "") -> list[fx.Node]:
    """Return the calls of an operator in a part of the model that read a weight with `reads` in its
    name."""
    parts = parts_by_node(program)
    return [
        node
        for node in program.nodes(operator)
        if parts[node] == part and reads in " ".join(source_tensors(program, node))
    ]


def set_argument(operator: str, part: str, position: int, value: Any, reads: str = "") -> Edit:
    """Return an edit that replaces an argument of calls; `value` may be a function of the node."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part, reads):
            new = value(node) if callable(value) else value
            node.args = (*node.args[:position], new, *node.args[position + 1 :])

    return edit


def swap_arguments(operator: str, part: str, first: int, second: int) -> Edit:
    """Return an edit that swaps two arguments."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part):
            args = list(node.args)
            args[first], args[second] = args[second], args[first]
            node.args = tuple(args)

    return edit


def skip_operator(operator: str, part: str, reads: str = "") -> Edit:
    """Return an edit that replaces an operator's result by its first input."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part, reads):
            node.replace_all_uses_with(node.args[0])

    return edit


class _ShiftedBase(float):
    """A rotary base whose powers are those of the next pair of dims."""

    def __pow__(self, steps: Any) -> Any:
        return float(self) ** (steps + steps[1])


def shift_rope(program: Program) -> None:
    ropes = {
        kind: Rope(_ShiftedBase(rope.theta), rope.partial)
        for kind, rope in program.config.rope.items()
    }
    program.config = replace(program.config, rope=ropes)


def state_outputs(program: Program, kind: str) -> list[int]:
    """Return the positions of the states of a kind among the outputs."""
    return [1 + index for index, spec in enumerate(program.states) if spec.kind == kind]


def return_stale_state(kind: str) -> Edit:
    """Return an edit that returns the first state of a kind without its update."""

    def edit(program: Program) -> None:
        output = program.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        states = program.inputs[2:]
        position = state_outputs(program, kind)[0]
        state = states[position - 1]
        with program.graph.inserting_before(output):
            results[position] = program.call(torch.ops.aten.view_as.default, state, state)
        output.args = (results,)

    return edit


def swap_conv_states(program: Program) -> None:
    output = program.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    first, second = state_outputs(program, "conv")[:2]
    results[first], results[second] = results[second], results[first]
    output.args = (results,)


def drop_gate_sigmoid(program: Program) -> None:
    for node in calls(program, "aten.sigmoid", "layer 1"):
        node.replace_all_uses_with(node.args[0])


def use_gain_of_previous_layer(program: Program) -> None:
    previous = calls(program, "lfm.add_rms_norm", "layer 1", "ffn_norm")
    for node in calls(program, "lfm.add_rms_norm", "layer 2", "ffn_norm"):
        node.args = (*node.args[:2], previous[0].args[2], *node.args[3:])


def roll_scales(packed: PackedTensor) -> PackedTensor:
    return replace(packed, scales=packed.scales.roll(1, dims=1))


def reverse_groups(packed: PackedTensor) -> PackedTensor:
    groups = packed.codes.unflatten(1, (packed.scales.shape[1], -1))
    return replace(packed, codes=groups.flip(1).flatten(1))


def drop_zero_point(packed: PackedTensor) -> PackedTensor:
    if packed.zeros is None:
        return packed
    return replace(packed, zeros=torch.full_like(packed.zeros, 1 << (packed.format.bits - 1)))


def swap_nibbles(packed: PackedTensor) -> PackedTensor:
    return replace(packed, codes=packed.codes.unflatten(1, (-1, 2)).flip(-1).flatten(1))


def shift_scales_by_row(packed: PackedTensor) -> PackedTensor:
    return replace(packed, scales=packed.scales.roll(1, dims=0))


def swap_experts(sources: tuple[str, ...]) -> tuple[str, ...]:
    replacements = {".experts.0.": ".experts.1.", ".experts.1.": ".experts.0."}
    return tuple(
        next((name.replace(old, new) for old, new in replacements.items() if old in name), name)
        for name in sources
    )


def reverse_merged_rows(sources: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(reversed(sources)) if "q_proj" in sources[0] else sources


def flip_sign_bit(packed: PackedTensor) -> PackedTensor:
    return replace(packed, codes=packed.codes ^ (1 << (packed.format.bits - 1)))


def use_softmax_router(program: Program) -> None:
    for node in calls(program, "aten.sigmoid", "layer 2"):
        with program.graph.inserting_after(node):
            program.replace(node, program.call(torch.ops.aten.softmax.int, node.args[0], -1))
