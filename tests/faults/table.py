"""The seeded faults, one a row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import PackedTensor
from tests.faults import edits
from tests.faults.fault import ALL, FUNCTIONAL, Fault


def stored_fault(
    name: str,
    about: str,
    kind: str,
    piece: str,
    tensor: str,
    packed: Callable[[PackedTensor], PackedTensor] | None = None,
    *,
    floats: Callable[[Tensor], Tensor] | None = None,
    sources: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None,
    targets: frozenset[str] = ALL,
) -> Fault:
    """A fault of a tensor's `piece`: codes, scales, zeros or values."""
    return Fault(
        name,
        about,
        kind,
        "stored tensor",
        piece,
        stored={} if packed is None else {tensor: packed},
        floats={} if floats is None else {tensor: floats},
        sources=sources,
        targets=targets,
        tensor=tensor,
    )


FAULTS = (
    Fault(
        "w1 and w3 swapped",
        "the gate and the other half of a dense feed-forward change places",
        "lfm2",
        "layer 1",
        "lfm.swiglu",
        edits.exchanged("lfm.swiglu", "layer 1", 0, 1),
    ),
    Fault(
        "experts' w1 and w3 swapped",
        "the same in every expert of a layer",
        "lfm2_moe",
        "layer 2",
        "lfm.moe",
        edits.exchanged("lfm.moe", "layer 2", 3, 4),
    ),
    Fault(
        "missing expert bias",
        "experts are chosen by their scores alone",
        "lfm2_moe",
        "layer 1",
        "lfm.moe",
        edits.with_argument("lfm.moe", "layer 1", 2, lambda node: node.args[1]),
    ),
    Fault(
        "bias in the scores",
        "the expert bias takes part in the weights, not only in the choice",
        "lfm2_moe",
        "layer 3",
        "lfm.moe",
        edits.with_argument("lfm.moe", "layer 3", 1, lambda node: node.args[2]),
    ),
    Fault(
        "shares not normalized",
        "the chosen experts' weights do not sum to one",
        "lfm2_moe",
        "layer 1",
        "lfm.moe",
        edits.with_argument("lfm.moe", "layer 1", 7, False),
    ),
    Fault(
        "routing scale dropped",
        "what experts give is not multiplied by the routing scale",
        "lfm2_moe-scaled",
        "layer 2",
        "lfm.moe",
        edits.with_argument("lfm.moe", "layer 2", 8, 1.0),
    ),
    Fault(
        "one expert too few",
        "each token goes to one expert less",
        "lfm2_moe",
        "layer 3",
        "lfm.moe",
        edits.with_argument("lfm.moe", "layer 3", 6, 1),
        targets=ALL - {"coreml"},  # its interpreter tells experts of layers that choose as many
    ),
    Fault(
        "rope off by one",
        "each pair of dims turns by the angle of the next one",
        "lfm2",
        "layer 1",
        "lfm.attention",
        edits.rope_off_by_one,
    ),
    Fault(
        "sliding window off by one",
        "a layer sees one position less than it should",
        "lfm3",
        "layer 1",
        "lfm.attention",
        edits.with_argument("lfm.attention", "layer 1", 10, 7),
    ),
    Fault(
        "sliding window dropped",
        "a sliding layer sees every position",
        "lfm3",
        "layer 1",
        "lfm.attention",
        edits.with_argument("lfm.attention", "layer 1", 10, 0),
    ),
    Fault(
        "q and k norms swapped",
        "queries are scaled by the gains of keys, and keys by those of queries",
        "lfm2",
        "layer 3",
        "lfm.attention",
        edits.exchanged("lfm.attention", "layer 3", 3, 4),
    ),
    Fault(
        "keys and values swapped",
        "the projections of keys and of values change places",
        "lfm3",
        "layer 2",
        "lfm.attention",
        edits.exchanged("lfm.attention", "layer 2", 1, 2),
    ),
    Fault(
        "heads not gated",
        "the gate of attention's heads lacks its sigmoid",
        "lfm3",
        "layer 1",
        "aten.sigmoid",
        edits.raw_gate,
    ),
    Fault(
        "norm behind a block skipped",
        "the second norm of a sandwich is left out",
        "lfm3",
        "layer 2",
        "lfm.rms_norm",
        edits.skipped("lfm.rms_norm", "layer 2", "post_ffn_norm"),
    ),
    Fault(
        "wrong epsilon",
        "a norm adds 1e-2 to the mean square, not 1e-5",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        edits.with_argument("lfm.add_rms_norm", "layer 2", 3, 1e-2, "operator_norm"),
    ),
    Fault(
        "residual lost",
        "a block's result is added to itself, not to what came in",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        edits.with_argument(
            "lfm.add_rms_norm", "layer 2", 1, lambda node: node.args[0], "ffn_norm"
        ),
    ),
    Fault(
        "gain of another layer",
        "a norm is given the gains of the layer before",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        edits.gain_of_another_layer,
    ),
    Fault(
        "stale conv state",
        "a filter's state is given back as it came",
        "lfm2",
        "layer 0",
        "lfm.gated_short_conv",
        edits.stale_state("conv"),
        targets=FUNCTIONAL,
    ),
    Fault(
        "conv states exchanged",
        "two layers get each other's state with the next call",
        "lfm2",
        "layer 0",
        "lfm.gated_short_conv",
        edits.states_exchanged,
        targets=FUNCTIONAL,
    ),
    Fault(
        "stale keys",
        "a cache of keys is given back as it came",
        "lfm2",
        "layer 1",
        "lfm.attention",
        edits.stale_state("key"),
        targets=FUNCTIONAL,
    ),
    Fault(
        "softmax router",
        "scores of experts compete by a softmax; each should be a sigmoid of its own",
        "lfm2_moe",
        "layer 2",
        "aten.sigmoid",
        edits.softmax_router,
        targets=frozenset({"onnx", "coreml", "mlir"}),
    ),
    Fault(
        "missing filter bias",
        "the short convolution has no bias",
        "lfm2-conv-bias",
        "layer 2",
        "lfm.gated_short_conv",
        edits.with_argument("lfm.gated_short_conv", "layer 2", 2, None),
    ),
    stored_fault(
        "dropped zero point",
        "codes are centred, whatever their zero points",
        "lfm2",
        "zeros",
        "layers.1.self_attn.q_proj",
        edits.no_zero_point,
        targets=ALL - {"executorch"},  # XNNPACK has none
    ),
    stored_fault(
        "scales one group off",
        "each group of a row has the scale of the one before",
        "lfm2",
        "scales",
        "layers.0.conv.in_proj",
        edits.roll_scales,
    ),
    stored_fault(
        "scales one row off",
        "each row has the scales of the one before",
        "lfm2",
        "scales",
        "layers.2.feed_forward.w2",
        edits.scale_of_next_row,
    ),
    stored_fault(
        "wrong group order",
        "a row's groups of codes stand from the last to the first",
        "lfm3",
        "codes",
        "layers.2.self_attn.o_proj",
        edits.turn_groups,
    ),
    stored_fault(
        "nibbles swapped",
        "the two codes of a byte change places",
        "lfm2",
        "codes",
        "embed_tokens",
        edits.swap_nibbles,
    ),
    stored_fault(
        "codes of the other sign",
        "the highest bit of every code is turned",
        "lfm2_moe",
        "codes",
        "layers.3.feed_forward.experts.4.w2",
        edits.turn_sign,
    ),
    stored_fault(
        "experts exchanged",
        "two experts of a layer lie in each other's place",
        "lfm2_moe",
        "codes",
        "layers.1.feed_forward.experts.0",
        sources=edits.experts_exchanged,
    ),
    stored_fault(
        "merged rows in another order",
        "of q, k and v in one matrix, v comes first",
        "lfm2",
        "codes",
        "layers.1.self_attn.q_proj",
        sources=edits.in_other_order,
    ),
    stored_fault(
        "transposed conv kernel",
        "a filter's taps stand from the newest to the oldest",
        "lfm2",
        "values",
        "layers.0.conv.conv",
        floats=lambda value: value.flip(-1),
    ),
    stored_fault(
        "rounded router",
        "the router's weights are rounded once more, to bfloat16",
        "lfm2_moe",
        "values",
        "layers.2.feed_forward.gate",
        floats=lambda value: value.bfloat16().to(value.dtype),
    ),
    stored_fault(
        "centred gains",
        "the gains of a norm are stored less one",
        "lfm2",
        "values",
        "layers.3.ffn_norm",
        floats=lambda value: value - 1,
    ),
)


def fault_table() -> str:
    """The faults as a table of Markdown, for docs/parity.md."""
    lines = ["| fault | what is wrong | caught by | the place | targets |", "|---|---|---|---|---|"]
    for own in FAULTS:
        gate = "read back" if own.is_stored else "rung 3"
        where = f"the {own.operator}" if own.is_stored else f"`{own.operator}`, {own.part}"
        targets = "all" if own.targets == ALL else ", ".join(sorted(own.targets))
        lines.append(f"| {own.name} | {own.about} | {gate} | {where} | {targets} |")
    return "\n".join(lines)
