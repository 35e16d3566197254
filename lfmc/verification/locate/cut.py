"""Cuts a program at a node, so that the value of the node replaces the logits.

Any intermediate value of an artifact can then be read through the target's `lower` and `run`.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, fx

from lfmc.graph.program import Program, Weight
from lfmc.passes.remove_dead_code import RemoveDeadCode

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def copy_program(program: Program) -> Program:
    """Copy the graph into a new module, bound to the same weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    module = fx.GraphModule(program.module, graph)
    return replace(program, module=module, weights=dict(program.weights))


def cut(program: Program, name: str) -> Program:
    """Return a copy of the program whose logits are the value of node `name`.

    A value `[B, T, ...]` is flattened to `[B, T, X]`; a value `[B * T, X]` requires a batch of one.
    The `vocab_size` of the copy is `X`. All states remain outputs.
    """
    copy = copy_program(program)
    node = next(node for node in copy.graph.nodes if node.name == name)
    output = copy.graph.output_node()
    states = list(output.args[0][1:])  # type: ignore[index, arg-type]
    with copy.graph.inserting_before(output):
        # Always add a view: some targets slice the last token of the input of the logits.
        value = (
            copy.call(torch.ops.aten.unsqueeze.default, node, 0)
            if node.meta["val"].dim() == 2
            else copy.call(torch.ops.aten.flatten.using_ints, node, 2)
        )
    output.args = ([value, *states],)
    RemoveDeadCode().run(copy)
    copy.graph.lint()
    copy.module.recompile()
    width = int(value.meta["val"].shape[-1])
    return replace(copy, config=replace(copy.config, vocab_size=width))


def observable_nodes(program: Program) -> list[fx.Node]:
    """Return the nodes that `cut` supports, in order: per-token floats on which logits depend."""
    graph = program.graph
    tokens = program.inputs[0].meta["val"]
    logits: fx.Node = graph.output_node().args[0][0]  # type: ignore[index, assignment]
    logits_inputs = ancestors(logits)
    return [
        node
        for node in graph.nodes
        if node in logits_inputs and node.op == "call_function" and _is_observable(node, tokens)
    ]


def _is_observable(node: fx.Node, tokens: Tensor) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    batch, length = tokens.shape
    if value.dim() == 2:
        return (
            bool(value.shape[0] == batch * length)
            and node.target is not torch.ops.lfm.dequantize.default
        )
    return value.dim() > 2 and bool(value.shape[0] == batch) and bool(value.shape[1] == length)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and all nodes that it depends on."""
    visited: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in visited:
            visited.add(current)
            stack.extend(current.all_input_nodes)
    return visited


def producing_node(node: fx.Node) -> fx.Node:
    """Return the operator that computes a node; a node may be one of an operator's results."""
    while getattr(node.target, "__name__", "") == "getitem":
        node = node.all_input_nodes[0]
    return node


def source_tensors(program: Program, node: fx.Node) -> tuple[str, ...]:
    """Return the checkpoint's tensors that an operator reads, directly or through a dequantize."""
    names: list[str] = []
    for value in node.all_input_nodes:
        is_dequantized = value.target is torch.ops.lfm.dequantize.default
        for constant in value.all_input_nodes if is_dequantized else [value]:
            if constant.op == "get_attr":
                names.extend(program.weights.get(str(constant.target), Weight(())).sources)
    return tuple(dict.fromkeys(names))


def parts_by_node(program: Program) -> dict[fx.Node, str]:
    """Map every node to "embedding", "layer 3" or "head", by the weights that it depends on."""
    head = program.config.num_layers
    depth: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before = max((depth[value] for value in node.all_input_nodes), default=-1)
        depth[node] = max([before, *_layer_depths(program.weights, node, before, head)])
    names = {-1: "embedding", head: "head"}
    return {node: names.get(layer, f"layer {layer}") for node, layer in depth.items()}


def _layer_depths(weights: dict[str, Weight], node: fx.Node, before: int, head: int) -> list[int]:
    """Return the layers of the weights that a call reads.

    Weights outside of the layers belong to the head if a layer comes before them.
    """
    depths = []
    for constant in node.all_input_nodes:
        if constant.op != "get_attr":
            continue
        for source in weights.get(str(constant.target), Weight(())).sources:
            layer = _LAYER.search(source)
            if layer:
                depths.append(int(layer[1]))
            elif before >= 0:
                depths.append(head)
    return depths
