"""Sparse experts in ONNX Runtime, with a width for every expert.

One QMoE node holds experts of one width. So a layer's experts are grouped by format, and every
group's node sees all tokens with its columns of one routing matrix:

    shares = scatter(0, topk(choice), normalized scores)                    # (N, E)
    y = sum over groups of QMoE(x, router = shares[:, group], weights of the group)

QMoE skips a token for an expert whose share is 0, so no expert runs in vain, and the routing (with
transformers' 1e-6) is exact. `tests/benchmarks/experts.py` says what it costs.
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

# Far below every log-sigmoid that matters, and its exponential is 0.
_NEVER = -1e4


def lower_moe(low: Lowering, node: fx.Node) -> ir.Value:
    """`lfm.moe` as one QMoE a format, or one MoE where the experts stay float."""
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    picked, shares, chosen = _route(low, scores, choice, top_k, normalize, scale)
    groups = _groups(low, [_sources(low, *parts) for parts in zip(w1, w3, w2, strict=True)])
    if list(groups) == [None]:
        return _float_moe(low, low.value(x), scores, picked, chosen, groups[None], top_k, shares)
    if None in groups:
        raise UnsupportedError(
            "experts of one layer are partly float and partly quantized",
            where=groups[None][0][1][0],
            todo="give every expert of a layer an integer format, or none",
        )
    outputs = [
        _quantized_moe(low, low.value(x), shares, members, format, len(w1), top_k)
        for format, members in groups.items()
        if format is not None
    ]
    y = outputs[0] if len(outputs) == 1 else low.emit.op("Sum", *outputs)
    widths = "+".join(str(f.bits) for f in groups if f is not None)
    return low.probe(node, f"QMoE {widths} bit", [x, scores, choice], y)


# An expert's place in the layer, and the names of its w1, w3 and w2.
Member = tuple[int, tuple[str, str, str]]


def _sources(low: Lowering, *weights: fx.Node) -> tuple[str, str, str]:
    one, three, two = map(low.program.tensor_behind, weights)
    return one, three, two


def _groups(
    low: Lowering, experts: list[tuple[str, str, str]]
) -> dict[Format | None, list[Member]]:
    """Experts by the format that their three matrices share; None for floats."""
    groups: dict[Format | None, list[Member]] = {}
    for index, names in enumerate(experts):
        planned = map(low.weights.format, names)
        formats = {f if isinstance(f, Format) else None for f in planned}
        if len(formats) != 1:
            raise UnsupportedError(
                "an expert's matrices have different formats; QMoE holds one",
                where=names[0],
                got=", ".join(f.name if f else "float" for f in formats),
                todo="give w1, w2 and w3 of an expert the same format",
            )
        groups.setdefault(formats.pop(), []).append((index, names))
    return groups


def _route(
    low: Lowering, scores: Any, choice: Any, top_k: int, normalize: bool, scale: float
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Scores of the chosen experts `[N, k]`, the routing matrix `[N, E]`, and who was chosen."""
    emit = low.emit
    _, chosen = emit.ops(2, "TopK", low.value(choice), emit.ints(top_k), axis=-1)
    picked = emit.op("GatherElements", low.value(scores), chosen, axis=1)
    shares = picked
    if normalize:
        total = emit.op("ReduceSum", picked, emit.ints(-1), keepdims=1)
        small = emit.number(1e-6)
        shares = emit.op("Div", picked, emit.op("Add", total, small))
    if scale != 1.0:
        shares = emit.op("Mul", shares, emit.number(scale))
    empty = emit.op("Mul", low.value(scores), emit.number(0.0))
    return picked, emit.op("ScatterElements", empty, chosen, shares, axis=1), chosen


def _quantized_moe(
    low: Lowering,
    x: ir.Value,
    shares: ir.Value,
    members: list[Member],
    format: Format,
    num_experts: int,
    top_k: int,
) -> ir.Value:
    emit = low.emit
    experts = [index for index, _ in members]
    own = shares
    if len(experts) < num_experts:
        own = emit.op("Gather", shares, emit.ints(*experts), axis=1)
    gate_up = tuple(name for _, (one, three, _) in members for name in (one, three))
    down = tuple(two for _, (_, _, two) in members)
    prefix = f"{down[0].split('.experts.')[0]}.experts.{format.bits}bit"
    q1, s1, z1 = _stack(low, f"{prefix}.w1+w3", gate_up, gate_up_pairs=True)
    q2, s2, z2 = _stack(low, f"{prefix}.w2", down, gate_up_pairs=False)
    inputs = [x, own, q1, s1, None, q2, s2, None, None, None, None, z1, z2, None, own]
    return emit.op(
        "QMoE",
        *inputs,
        domain=CONTRIB,
        k=min(top_k, len(experts)),
        block_size=format.group,
        expert_weight_bits=format.bits,
        activation_type="swiglu",
        swiglu_fusion=1,  # rows of gate and up in turn: the only form on CPU
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        accuracy_level=low.accuracy_level,
        quant_type="int",
        use_sparse_mixer=0,
    )


def _stack(
    low: Lowering, name: str, sources: tuple[str, ...], *, gate_up_pairs: bool
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes `[E, N, bytes]`, scales `[E, N, G]` and zero points of a group's experts."""
    pieces = [low.weights.packed((source,)) for source in sources]
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
        return low.emit.weight(name, part, sources, value, order)  # type: ignore[arg-type]

    return write("codes"), write("scales"), write("zeros") if has_zeros else None


def interleave(gate_up: list[Tensor]) -> Tensor:
    """`[E, 2I, ...]` with the rows of each expert's w1 and w3 (`[I, ...]`, adjacent) in turn."""
    pairs = zip(gate_up[::2], gate_up[1::2], strict=True)
    return torch.stack([torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs])


def _float_moe(
    low: Lowering,
    x: ir.Value,
    scores: Any,
    picked: ir.Value,
    chosen: ir.Value,
    members: list[Member],
    top_k: int,
    shares: ir.Value,
) -> ir.Value:
    """Experts as floats: MoE mixes by a softmax over router logits, so it is given logarithms.

    softmax(log s) = s / sum(s) over the chosen; the true weights sum to something else, which is
    put back on the result.
    """
    emit = low.emit
    never = emit.op("Add", emit.op("Mul", low.value(scores), emit.number(0.0)), emit.number(_NEVER))
    logits = emit.op("ScatterElements", never, chosen, emit.op("Log", picked), axis=1)
    weights = low.weights
    gate_up = tuple(name for _, (one, three, _) in members for name in (one, three))
    down = tuple(two for _, (_, _, two) in members)
    prefix = down[0].split(".experts.")[0] + ".experts"
    w13 = interleave([weights.floats((name,)) for name in gate_up])
    w2 = torch.stack([weights.floats((name,)) for name in down])
    fc1 = emit.weight(f"{prefix}.w1+w3.weight", "values", gate_up, w13, "experts_gate_up")
    fc2 = emit.weight(f"{prefix}.w2.weight", "values", down, w2, "experts")
    y = emit.op(
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
    return emit.op("Mul", y, emit.op("ReduceSum", shares, emit.ints(-1), keepdims=1))
