"""Run a program with the forms of its operators; a trace of the run is an accelerator's graph."""

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
from lfmc.targets.shared.plain_torch import ConstantRef, call_torch_operator

MOVING = ("aten.view", "aten.reshape", "aten.transpose", "aten.permute", "aten.unsqueeze")


def run_program(forms: Forms, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return outputs by name, for inputs by name."""
    forms.start_call(inputs)
    graph = forms.program.graph
    tokens, positions, *states = forms.program.inputs
    names = (spec.identifier for spec in forms.interface.states)
    state_values = [State(name, forms.inputs[name]) for name in names]
    values: dict[fx.Node, Any] = dict(zip(states, state_values, strict=True))
    values[tokens] = torch.zeros(
        1, forms.interface.tokens, dtype=torch.int32
    )  # only its shape is used
    values[positions] = None
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = _constant(forms, node)
        elif node.op == "call_function":
            values[node] = _call(forms, node, values)
    logits, *new_states = arguments(graph.output_node())[0]
    outputs = (values[logits], *(values[node] for node in new_states))
    return dict(zip(forms.interface.outputs, outputs, strict=True))


def _constant(forms: Forms, node: fx.Node) -> ConstantRef | Rope:
    weight = forms.program.weights[str(node.target)]
    if weight.part == "constant":
        return Rope(str(node.target).removeprefix("rope."))
    return ConstantRef(weight.sources, weight.part)


def _call(forms: Forms, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    forms.enter(node)
    name = operator_name(node)
    if name in HANDLERS:
        args = fx.map_arg(arguments(node), values.__getitem__)
        return HANDLERS[name](forms, *args)
    result = call_torch_operator(node, values, forms.load_constant, "accelerator")
    is_float = isinstance(result, Tensor) and result.is_floating_point()
    part = SIGMOID if name == "aten.sigmoid" else ""
    return forms.round(result, part) if is_float and name not in MOVING else result
