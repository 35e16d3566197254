"""Runs a program by the forms of its operators; traced, that is a graph of ATen operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from lfmc.graph.program import operator_name
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.mlir.forms import Forms
from lfmc.targets.mlir.handlers import HANDLERS, up_to
from lfmc.targets.mlir.named import Handler, Named
from lfmc.targets.shared.plain_torch import PASSED, Held, call_plain


def run_program(
    forms: Forms,
    tokens: Tensor,
    start: Tensor,
    states: Sequence[Tensor],
    *,
    last_only: bool,
    named: Named | None = None,
) -> tuple[Tensor, ...]:
    """Logits `[T, V]`, or `[1, V]` of the last, of tokens int32 `[T]` that come at position
    `start` int32 `[1]`, and the new states. With `named` operators stay operators of the graph."""
    positions = start + up_to(len(tokens))
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
    """A constant; rotary steps follow from the configuration."""
    name = str(node.target)
    weight = forms.program.weights[name]
    if weight.part != "constant":
        return Held(weight.sources)
    config, kind = forms.program.config, name.removeprefix("rope.")
    return forms.given(
        forms.constants.of_config(name, lambda: inverse_frequencies(config, kind).float())
    )


def _call(forms: Forms, node: fx.Node, values: Mapping[fx.Node, Any], named: Named | None) -> Any:
    name = operator_name(node)
    if name not in HANDLERS:
        return call_plain(node, values, forms.floats, "MLIR")
    args: Any = fx.map_arg(arguments(node), values.__getitem__)
    if named is None or name in PASSED:
        return HANDLERS[name](forms, *args)
    return named.call(name.removeprefix("lfm."), _handler(forms, name), forms.given, args)


def _handler(forms: Forms, name: str) -> Handler:
    """The form of an operator, of what gives it parameters."""
    return lambda given, *args: HANDLERS[name](replace(forms, given=given), *args)
