"""Runs a program by the forms of its operators; traced, that is an accelerator's graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.graph.program import operator_name
from lfmc.passes.pattern import arguments
from lfmc.targets.npu.forms import Forms, Rope, State
from lfmc.targets.npu.handlers import HANDLERS
from lfmc.targets.npu.names import SIGMOID
from lfmc.targets.shared.plain_torch import Held, call_plain

MOVING = ("aten.view", "aten.reshape", "aten.transpose", "aten.permute", "aten.unsqueeze")


def run_program(forms: Forms, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name, of inputs by name."""
    forms.begin(inputs)
    graph = forms.program.graph
    tokens, positions, *states = forms.program.inputs
    names = (spec.identifier for spec in forms.interface.states)
    state_values = [State(name, forms.inputs[name]) for name in names]
    values: dict[fx.Node, Any] = dict(zip(states, state_values, strict=True))
    values[tokens] = torch.zeros(1, forms.interface.tokens, dtype=torch.int32)  # its shape
    values[positions] = None
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = _constant(forms, node)
        elif node.op == "call_function":
            values[node] = _call(forms, node, values)
    logits, *new_states = arguments(graph.output_node())[0]
    outputs = (values[logits], *(values[node] for node in new_states))
    return dict(zip(forms.interface.outputs, outputs, strict=True))


def _constant(forms: Forms, node: fx.Node) -> Held | Rope:
    weight = forms.program.weights[str(node.target)]
    if weight.part == "constant":
        return Rope(str(node.target).removeprefix("rope."))
    return Held(weight.sources, weight.part)


def _call(forms: Forms, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    forms.at(node)
    name = operator_name(node)
    if name in HANDLERS:
        args = fx.map_arg(arguments(node), values.__getitem__)
        return HANDLERS[name](forms, *args)
    result = call_plain(node, values, forms.small, "accelerators'")
    is_float = isinstance(result, Tensor) and result.is_floating_point()
    part = SIGMOID if name == "aten.sigmoid" else ""
    return forms.keep(result, part) if is_float and name not in MOVING else result
