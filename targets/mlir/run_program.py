"""Execution of a program by its handlers; tracing it yields a graph of ATen operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from lfmc.graph.program import operator_name
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.mlir.forms import Forms
from lfmc.targets.mlir.handlers import HANDLERS, arange_int32
from lfmc.targets.mlir.named import Handler, NamedOperators
from lfmc.targets.shared.plain_torch import PASS_THROUGH, ConstantRef, call_torch_operator


def run_program(
    forms: Forms,
    tokens: Tensor,
    start: Tensor,
    states: Sequence[Tensor],
    *,
    last_only: bool,
    named: NamedOperators | None = None,
) -> tuple[Tensor, ...]:
    """Return the logits `[T, V]` of tokens int32 `[T]`, and the new states.

    The first token is at position `start` int32 `[1]`. With `last_only` the logits are `[1, V]`, of
    the last token. With `named` the program's operators stay operators of the graph.
    """
    positions = start + arange_int32(len(tokens))
    inputs = iter([tokens.unsqueeze(0), positions, *states])
    values: dict[fx.Node, Any] = {}
    results: Sequence[fx.Node] = arguments(forms.program.graph.output_node())[0]
    for node in forms.program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            values[node] = _constant(forms, node)
        elif node.op == "call_function":
            if node is results[0] and last_only:
                hidden = node.all_input_nodes[0]
                values[hidden] = values[hidden][:, -1:]
            values[node] = _call(forms, node, values, named)
    logits, *new_states = (values[node] for node in results)
    return (logits[0], *new_states)


def _constant(forms: Forms, node: fx.Node) -> Any:
    """Return a constant; rotary frequencies are computed from the configuration."""
    name = str(node.target)
    weight = forms.program.weights[name]
    if weight.part != "constant":
        return ConstantRef(weight.sources)
    config, kind = forms.program.config, name.removeprefix("rope.")
    return forms.load(
        forms.constants.config_constant(name, lambda: inverse_frequencies(config, kind).float())
    )


def _call(
    forms: Forms, node: fx.Node, values: Mapping[fx.Node, Any], named: NamedOperators | None
) -> Any:
    name = operator_name(node)
    if name not in HANDLERS:
        return call_torch_operator(node, values, forms.floats, "MLIR")
    args: Any = fx.map_arg(arguments(node), values.__getitem__)
    if named is None or name in PASS_THROUGH:
        return HANDLERS[name](forms, *args)
    return named.call(name.removeprefix("lfm."), _bind_handler(forms, name), forms.load, args)


def _bind_handler(forms: Forms, name: str) -> Handler:
    """Return an operator's handler as a function whose first argument loads parameters."""
    return lambda load, *args: HANDLERS[name](replace(forms, load=load), *args)
