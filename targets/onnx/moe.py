"""Sparse experts in ONNX Runtime, with a bit width per expert.

A QMoE node supports one bit width. So the experts of a layer are grouped by format. The node of
each group gets all tokens, and its columns of one routing matrix:

    shares = scatter(0, topk(choice), normalized scores)                    # (N, E)
    y = sum over groups of QMoE(x, router = shares[:, group], weights of the group)

QMoE skips a token for an expert whose share is 0, so no product is wasted, and the routing (with
the 1e-6 of transformers) is exact. `tests/benchmarks/experts.py` measures the cost.

QMoE on WebGPU has no input for shares: it computes a softmax of its router logits over the k
largest. In the layout for browsers, the logits are therefore logarithms of the shares:

    softmax(log shares[:, group]) * sum(shares[:, group]) = shares[:, group]
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from lfmc.calib_free.grid.formats import Format
from lfmc.errors import UnsupportedError
from lfmc.passes.pattern import arguments
from lfmc.targets.onnx.emitter import CONTRIB
from lfmc.targets.onnx.lower import Lowering

# The router logit of an expert that was not chosen: far below every relevant log-sigmoid, and its
# exponential is 0.
_EXCLUDED = -1e4
# The least share whose logarithm QMoE gets on WebGPU, where the softmax subtracts no maximum: the
# exponentials of a group without a chosen expert must not all be 0.
_LEAST_SHARE = 1e-30


def lower_moe(lowering: Lowering, node: fx.Node) -> ir.Value:
    """Lower `lfm.moe` to one QMoE node per format, or to one MoE node if the experts stay float."""
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    chosen_scores, shares, chosen_experts = _route(
        lowering, scores, choice, top_k, normalize, scale
    )
    groups = _groups(
        lowering, [_sources(lowering, *parts) for parts in zip(w1, w3, w2, strict=True)]
    )
    if list(groups) == [None]:
        return _float_moe(
            lowering,
            lowering.value(x),
            scores,
            chosen_scores,
            chosen_experts,
            groups[None],
            top_k,
            shares,
        )
    if None in groups:
        raise UnsupportedError(
            "experts of one layer are partly float and partly quantized",
            where=groups[None][0][1][0],
            todo="give every expert of a layer an integer format, or none",
        )
    outputs = [
        _quantized_moe(lowering, lowering.value(x), shares, members, format, len(w1), top_k)
        for format, members in groups.items()
        if format is not None
    ]
    y = outputs[0] if len(outputs) == 1 else lowering.emitter.op("Sum", *outputs)
    widths = "+".join(str(f.bits) for f in groups if f is not None)
    return lowering.probe(node, f"QMoE {widths} bit", [x, scores, choice], y)


# The index of an expert in its layer, and the names of its w1, w3 and w2.
Member = tuple[int, tuple[str, str, str]]


def _sources(lowering: Lowering, *weights: fx.Node) -> tuple[str, str, str]:
    w1, w3, w2 = map(lowering.program.tensor_behind, weights)
    return w1, w3, w2


def _groups(
    lowering: Lowering, experts: list[tuple[str, str, str]]
) -> dict[Format | None, list[Member]]:
    """Group experts by the format that their three matrices share; the key is None for floats."""
    groups: dict[Format | None, list[Member]] = {}
    for index, names in enumerate(experts):
        planned = map(lowering.weights.format, names)
        formats = {f if isinstance(f, Format) else None for f in planned}
        if len(formats) != 1:
            raise UnsupportedError(
                "an expert's matrices have different formats; QMoE supports one",
                where=names[0],
                got=", ".join(f.name if f else "float" for f in formats),
                todo="give w1, w2 and w3 of an expert the same format",
            )
        groups.setdefault(formats.pop(), []).append((index, names))
    return groups


def _route(
    lowering: Lowering, scores: Any, choice: Any, top_k: int, normalize: bool, scale: float
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the chosen experts' scores `[N, k]`, the routing matrix `[N, E]` and their indices."""
    emitter = lowering.emitter
    _, chosen_experts = emitter.ops(2, "TopK", lowering.value(choice), emitter.ints(top_k), axis=-1)
    chosen_scores = emitter.op("GatherElements", lowering.value(scores), chosen_experts, axis=1)
    shares = chosen_scores
    if normalize:
        total = emitter.op("ReduceSum", chosen_scores, emitter.ints(-1), keepdims=1)
        epsilon = emitter.number(1e-6)
        shares = emitter.op("Div", chosen_scores, emitter.op("Add", total, epsilon))
    if scale != 1.0:
        shares = emitter.op("Mul", shares, emitter.number(scale))
    empty = emitter.op("Mul", lowering.value(scores), emitter.number(0.0))
    return (
        chosen_scores,
        emitter.op("ScatterElements", empty, chosen_experts, shares, axis=1),
        chosen_experts,
    )


def _quantized_moe(
    lowering: Lowering,
    x: ir.Value,
    shares: ir.Value,
    members: list[Member],
    format: Format,
    num_experts: int,
    top_k: int,
) -> ir.Value:
    emitter = lowering.emitter
    experts = [index for index, _ in members]
    group_shares = shares
    if len(experts) < num_experts:
        group_shares = emitter.op("Gather", shares, emitter.ints(*experts), axis=1)
    gate_up = tuple(name for _, (w1, w3, _) in members for name in (w1, w3))
    down = tuple(w2 for _, (_, _, w2) in members)
    prefix = f"{down[0].split('.experts.')[0]}.experts.{format.bits}bit"
    q1, s1, z1 = _stack(lowering, f"{prefix}.w1+w3", gate_up, gate_up_pairs=True)
    q2, s2, z2 = _stack(lowering, f"{prefix}.w2", down, gate_up_pairs=False)
    attributes: dict[str, Any] = {
        "k": min(top_k, len(experts)),
        "block_size": format.group,
        "expert_weight_bits": format.bits,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # rows of gate and up interleaved: the only layout on CPU
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    weights = [q1, s1, None, q2, s2, None, None, None, None, z1, z2]
    if not lowering.layout.runs_in_browsers:
        return emitter.op(
            "QMoE",
            *(x, group_shares, *weights, None, group_shares),
            domain=CONTRIB,
            **attributes,
            normalize_routing_weights=0,
            accuracy_level=lowering.accuracy_level,
            quant_type="int",
            use_sparse_mixer=0,
        )
    logits = emitter.op("Log", emitter.op("Max", group_shares, emitter.number(_LEAST_SHARE)))
    y = emitter.op(
        "QMoE",
        *(x, logits, *(weights if z1 is not None else weights[:5])),
        domain=CONTRIB,
        **attributes,  # no accuracy_level: ONNX Runtime 1.30, of transformers.js, refuses it
        normalize_routing_weights=1,
        quant_type="int",
        use_sparse_mixer=0,
    )
    total = emitter.op("ReduceSum", group_shares, emitter.ints(-1), keepdims=1)
    return emitter.op("Mul", y, total)


def _stack(
    lowering: Lowering, name: str, sources: tuple[str, ...], *, gate_up_pairs: bool
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Write the codes `[E, N, bytes]`, scales `[E, N, G]` and zero points of a group of experts."""
    pieces = [lowering.weights.packed((source,)) for source in sources]
    zeros = [p.packed_zeros() for p in pieces]
    has_zeros = all(z is not None for z in zeros)
    parts: dict[str, list[Tensor]] = {
        "codes": [p.packed_codes() for p in pieces],
        "scales": [p.scales for p in pieces],
        "zeros": [z for z in zeros if z is not None],
    }

    def write(part: str) -> ir.Value:
        rows = parts[part]
        order = "experts_gate_up" if gate_up_pairs else "experts"
        value = interleave(rows) if gate_up_pairs else torch.stack(rows)
        return lowering.emitter.weight(name, part, sources, value, order)  # type: ignore[arg-type]

    return write("codes"), write("scales"), write("zeros") if has_zeros else None


def interleave(gate_up: list[Tensor]) -> Tensor:
    """Interleave the rows of adjacent w1 and w3 (`[I, ...]` each); returns `[E, 2I, ...]`."""
    pairs = zip(gate_up[::2], gate_up[1::2], strict=True)
    return torch.stack([torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs])


def _float_moe(
    lowering: Lowering,
    x: ir.Value,
    scores: Any,
    chosen_scores: ir.Value,
    chosen_experts: ir.Value,
    members: list[Member],
    top_k: int,
    shares: ir.Value,
) -> ir.Value:
    """Lower float experts: MoE applies a softmax to router logits, so it gets logarithms of scores.

    softmax(log s) = s / sum(s) over the chosen experts. The true shares have another sum, so the
    output is multiplied by it.
    """
    emitter = lowering.emitter
    excluded = emitter.op(
        "Add",
        emitter.op("Mul", lowering.value(scores), emitter.number(0.0)),
        emitter.number(_EXCLUDED),
    )
    logits = emitter.op(
        "ScatterElements", excluded, chosen_experts, emitter.op("Log", chosen_scores), axis=1
    )
    weights = lowering.weights
    gate_up = tuple(name for _, (w1, w3, _) in members for name in (w1, w3))
    down = tuple(w2 for _, (_, _, w2) in members)
    prefix = down[0].split(".experts.")[0] + ".experts"
    w13 = interleave([weights.floats((name,)) for name in gate_up])
    w2 = torch.stack([weights.floats((name,)) for name in down])
    fc1 = emitter.weight(f"{prefix}.w1+w3.weight", "values", gate_up, w13, "experts_gate_up")
    fc2 = emitter.weight(f"{prefix}.w2.weight", "values", down, w2, "experts")
    y = emitter.op(
        "MoE",
        *(x, logits, fc1, None, fc2),
        domain=CONTRIB,
        k=top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
        use_sparse_mixer=0,
    )
    return emitter.op("Mul", y, emitter.op("ReduceSum", shares, emitter.ints(-1), keepdims=1))
