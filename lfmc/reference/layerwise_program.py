"""Runs a bound program on many conversations with the constants of one segment in memory.

The graph is cut wherever no state is in use, which is about once per layer. All calls of all
conversations run a segment before the next one begins, so every constant is read, and every matrix
dequantized, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.graph.program import Program
from lfmc.model import state_specs
from lfmc.reference.operators import Operators, has_nbit_matrix, read_matrix
from lfmc.run.conversation import Conversation, Reply
from lfmc.run.expert_choice import ExpertChoice, choice_of_scores, concat_choices

# Called with a node, its value, and the indices of the conversation and of the call.
Observe = Callable[[fx.Node, Any, int, int], None]
Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Segment:
    """Consecutive calls of a graph; `states` are the indices of the states that they update.

    `last_uses` are nodes whose values no later segment reads.
    """

    nodes: tuple[fx.Node, ...]
    states: tuple[int, ...]
    last_uses: frozenset[fx.Node]


class LayerwiseProgram:
    """A bound program in torch. `context` is the number of cache slots of its states.

    `operators` compute its operators, in float32 or rounded as in a runtime. `progress` receives
    a count of the segments.
    """

    last_only = False

    def __init__(
        self,
        program: Program,
        context: int,
        operators: Operators | None = None,
        *,
        observe: Observe | None = None,
        progress: Callable[[str], None] = lambda detail: None,
    ) -> None:
        self._program, self._context = program, context
        self._operators = operators or Operators()
        self._observe, self._progress = observe, progress

    def run(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation."""
        program = self._program
        tokens, positions, *_ = program.inputs
        values: list[list[Values]] = []
        for conversation in conversations:
            starts = [0, *conversation.ends]
            values.append(
                [
                    {tokens: ids.view(1, -1), positions: torch.arange(start, start + len(ids))}
                    for ids, start in zip(conversation.calls, starts, strict=False)
                ]
            )
        scores: list[list[list[Tensor]]] = [[[] for _ in calls] for calls in values]
        segments = list(split(program))
        with torch.no_grad():
            for index, segment in enumerate(segments):
                self._progress(f"segment {index + 1} of {len(segments)}")
                self._run_segment(segment, values, scores)
        logits, _ = _outputs(program)
        return [
            Reply(torch.cat([call[logits][0] for call in calls]), self._choice(call_scores))
            for calls, call_scores in zip(values, scores, strict=True)
        ]

    def _run_segment(
        self, segment: Segment, values: list[list[Values]], scores: list[list[list[Tensor]]]
    ) -> None:
        program = self._program
        _, state_outputs = _outputs(program)
        state_inputs = program.inputs[2:]
        constants = _read_constants(program, segment)
        specs = state_specs(program.config, 1, self._context)
        for number, calls in enumerate(values):
            current: Values = {state_inputs[i]: torch.zeros(specs[i].shape) for i in segment.states}
            for call_number, call in enumerate(calls):
                call.update(current)
                for node in segment.nodes:
                    call[node] = self._run_node(node, call, constants)
                    if node.target is torch.ops.lfm.moe.default:
                        scores[number][call_number].append(call[node.args[2]])  # type: ignore[index]
                    if self._observe is not None:
                        self._observe(node, call[node], number, call_number)
                current = {state_inputs[i]: call[state_outputs[i]] for i in segment.states}
                for node in segment.last_uses:
                    call.pop(node, None)

    def _run_node(self, node: fx.Node, call: Values, constants: Values) -> Any:
        if node.target is torch.ops.lfm.dequantize.default:
            return constants[node]
        if node.target is torch.ops.lfm.linear_nbits.default:
            x, bias = node.args[0], node.args[4]
            return self._operators.linear(call[x], constants[node], constants.get(bias))  # type: ignore[index, arg-type]
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: constants[n] if n.op == "get_attr" else call[n]
        )
        return self._operators.call(node, args, kwargs)

    def _choice(self, scores: list[list[Tensor]]) -> ExpertChoice | None:
        moe = self._program.config.moe
        if moe is None:
            return None
        choices = [choice_of_scores(call_scores, moe.top_k) for call_scores in scores]
        recorded = [choice for choice in choices if choice is not None]
        return concat_choices(recorded) if recorded else None


def _read_constants(program: Program, segment: Segment) -> Values:
    """Return the constants of a segment; an n-bit matrix by the node of its call."""
    constants: Values = {}
    for node in segment.nodes:
        names = node.all_input_nodes
        if has_nbit_matrix(node):
            constants[node] = read_matrix(program, node)
            names = [node.args[4]] if node.target is torch.ops.lfm.linear_nbits.default else []  # type: ignore[list-item]
        for constant in names:
            if constant is not None and constant.op == "get_attr":
                constants[constant] = program.constant(str(constant.target))
    return constants


def _outputs(program: Program) -> tuple[fx.Node, list[fx.Node]]:
    """Return the nodes of the logits and of the new states."""
    values: Any = program.graph.output_node().args[0]
    logits, *states = values
    return logits, states


def split(program: Program) -> Iterator[Segment]:
    """Split a program into segments, each as short as its states allow."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    position = {node: index for index, node in enumerate(nodes)}
    logits, state_outputs = _outputs(program)
    spans = [
        (min(position[user] for user in state.users if user in position), position[new])
        for state, new in zip(program.inputs[2:], state_outputs, strict=True)
    ]
    last_use = {
        value: max((position.get(user, -1) for user in value.users), default=-1)
        for value in [*program.inputs, *nodes]
        if value is not logits
    }
    begin = 0
    for end in range(1, len(nodes) + 1):
        if any(first < end <= last for first, last in spans):
            continue
        yield Segment(
            tuple(nodes[begin:end]),
            tuple(i for i, (first, _) in enumerate(spans) if begin <= first < end),
            frozenset(
                value
                for value, use in last_use.items()
                if begin <= max(use, position.get(value, -1)) < end
            ),
        )
        begin = end
