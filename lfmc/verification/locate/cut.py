"""A program cut at a node: its value stands where the logits were, all else is as it was.

So a target shows what is inside of an artifact by the two verbs that it has, `lower` and `run`.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, fx

from lfmc.graph.program import Program, Weight
from lfmc.passes.remove_dead_code import RemoveDeadCode

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def copied(program: Program) -> Program:
    """The same graph in a module of its own; its constants are the same tensors."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    module = fx.GraphModule(program.module, graph)
    return Program(module, program.config, program.states, dict(program.weights))


def cut(program: Program, name: str) -> Program:
    """A copy whose logits are the value of node `name`, `[B, T, X]` for any dims behind the first
    two, or of `[B * T, X]` for a batch of one; its `vocab_size` is `X`.

    States are all kept, with what they need.
    """
    made = copied(program)
    node = next(node for node in made.graph.nodes if node.name == name)
    output = made.graph.output_node()
    states = list(output.args[0][1:])  # type: ignore[index, arg-type]
    with made.graph.inserting_before(output):
        # One view in any case: some targets take the last token of what the logits are made from.
        shown = (
            made.call(torch.ops.aten.unsqueeze.default, node, 0)
            if node.meta["val"].dim() == 2
            else made.call(torch.ops.aten.flatten.using_ints, node, 2)
        )
    output.args = ([shown, *states],)
    RemoveDeadCode().run(made)
    made.graph.lint()
    made.module.recompile()
    width = int(shown.meta["val"].shape[-1])
    return Program(made.module, replace(made.config, vocab_size=width), made.states, made.weights)


def shown_nodes(program: Program) -> list[fx.Node]:
    """Nodes that `cut` can show: floats for each token, on the way to the logits, in order."""
    graph = program.graph
    tokens = program.inputs[0].meta["val"]
    logits: fx.Node = graph.output_node().args[0][0]  # type: ignore[index, assignment]
    wanted = ancestors(logits)
    return [
        node
        for node in graph.nodes
        if node in wanted and node.op == "call_function" and _is_shown(node, tokens)
    ]


def _is_shown(node: fx.Node, tokens: Tensor) -> bool:
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
    """A node and everything that it is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        own = waiting.pop()
        if own not in found:
            found.add(own)
            waiting.extend(own.all_input_nodes)
    return found


def producer(node: fx.Node) -> fx.Node:
    """The operator behind a node: of one of several results, what gives them."""
    while getattr(node.target, "__name__", "") == "getitem":
        node = node.all_input_nodes[0]
    return node


def read_weights(program: Program, node: fx.Node) -> tuple[str, ...]:
    """The checkpoint's tensors that an operator reads, through what dequantizes them."""
    found: list[str] = []
    for given in node.all_input_nodes:
        inner = (
            given.all_input_nodes if given.target is torch.ops.lfm.dequantize.default else [given]
        )
        for own in inner:
            if own.op == "get_attr":
                found.extend(program.weights.get(str(own.target), Weight(())).sources)
    return tuple(dict.fromkeys(found))


def parts(program: Program) -> dict[fx.Node, str]:
    """For every node "embedding", "layer 3" or "head": where the weights lie that it hangs on."""
    head = program.config.num_layers
    depth: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before = max((depth[own] for own in node.all_input_nodes), default=-1)
        depth[node] = max([before, *_depths(program.weights, node, before, head)])
    names = {-1: "embedding", head: "head"}
    return {node: names.get(at, f"layer {at}") for node, at in depth.items()}


def _depths(weights: dict[str, Weight], node: fx.Node, before: int, head: int) -> list[int]:
    """Layers of the weights that a call reads; those of no layer, behind layers, are the head's."""
    found = []
    for given in node.all_input_nodes:
        if given.op != "get_attr":
            continue
        for source in weights.get(str(given.target), Weight(())).sources:
            layer = _LAYER.search(source)
            if layer:
                found.append(int(layer[1]))
            elif before >= 0:
                found.append(head)
    return found
