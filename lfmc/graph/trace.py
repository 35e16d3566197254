"""Traces the decoder without its weights, with the shapes that a target requires."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from lfmc.graph.program import Program, Weight, set_attribute
from lfmc.model import Decoder, DecoderConfig, state_specs
from lfmc.model.attention import CACHE_WRITES


@dataclass(frozen=True)
class TraceSpec:
    """The shapes and the cache write that a target requires of the graph.

    `batch` and `length` (tokens per call) are static sizes, or None for dynamic sizes. `context` is
    the number of cache slots. `cache_write` is one of `lfmc.model.attention.CACHE_WRITES`.
    """

    context: int
    batch: int | None = 1
    length: int | None = None
    cache_write: str = CACHE_WRITES[0]


def trace(config: DecoderConfig, spec: TraceSpec) -> Program:
    """Trace the decoder with `torch.export` and fake weights, so 8B parameters need no memory.

    The trace runs in FakeTensorMode on the CPU: on the meta device, nodes would contain
    `device="meta"`.
    """
    batch, length = spec.batch or 2, spec.length or min(3, spec.context)
    states = state_specs(config, batch, spec.context)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        decoder = Decoder(config, spec.cache_write).eval().requires_grad_(False)
        inputs = (
            torch.zeros(batch, length, dtype=torch.int64),
            torch.zeros(length, dtype=torch.int64),
            [torch.zeros(state.shape) for state in states],
        )
        b, t = (Dim.STATIC if n else Dim.DYNAMIC for n in (spec.batch, spec.length))
        shapes = ({0: b, 1: t}, {0: t}, [{0: b} for _ in states])
        exported = torch.export.export(decoder, inputs, dynamic_shapes=shapes, strict=False)
    module, names = lift_constants(exported)
    weights = {n: Weight((), "constant") if n.startswith("rope.") else Weight((n,)) for n in names}
    return Program(module, config, states, weights)


def lift_constants(exported: torch.export.ExportedProgram) -> tuple[fx.GraphModule, list[str]]:
    """Turn parameters and buffers into `get_attr` nodes; return the module and their names.

    The remaining placeholders are the user's inputs. The outputs are one flat tuple.
    """
    signature = exported.graph_signature
    constants = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants.update(signature.inputs_to_lifted_tensor_constants)
    values = {**exported.state_dict, **exported.constants}
    graph = fx.Graph()
    module = fx.GraphModule(torch.nn.Module(), graph)
    for name, submodule in exported.graph_module.named_children():
        module.add_module(name, submodule)
    copies: dict[fx.Node, fx.Node] = {}
    names = []
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            name = constants[node.name]
            set_attribute(module, name, values[name].detach())
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
            names.append(name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.lint()
    module.recompile()
    return module, names
