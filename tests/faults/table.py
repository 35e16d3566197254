"""The table of seeded faults."""

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
    part: str,
    tensor: str,
    packed: Callable[[PackedTensor], PackedTensor] | None = None,
    *,
    floats: Callable[[Tensor], Tensor] | None = None,
    sources: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None,
    targets: frozenset[str] = ALL,
) -> Fault:
    """Return a fault of a part of a stored tensor: codes, scales, zeros or values."""
    return Fault(
        name,
        about,
        kind,
        "stored tensor",
        part,
        stored={} if packed is None else {tensor: packed},
        floats={} if floats is None else {tensor: floats},
        sources=sources,
        targets=targets,
        tensor=tensor,
    )


FAULTS = (
    Fault(
        "w1 and w3 swapped",
        "the gate and up projections of a dense feed-forward block are swapped",
        "lfm2",
        "layer 1",
        "lfm.swiglu",
        edits.swap_arguments("lfm.swiglu", "layer 1", 0, 1),
    ),
    Fault(
        "experts' w1 and w3 swapped",
        "the gate and up projections of every expert of a layer are swapped",
        "lfm2_moe",
        "layer 2",
        "lfm.moe",
        edits.swap_arguments("lfm.moe", "layer 2", 3, 4),
    ),
    Fault(
        "missing expert bias",
        "experts are selected by their scores without the bias",
        "lfm2_moe",
        "layer 1",
        "lfm.moe",
        edits.set_argument("lfm.moe", "layer 1", 2, lambda node: node.args[1]),
    ),
    Fault(
        "bias in the scores",
        "the expert bias changes the weights of the experts, not only their selection",
        "lfm2_moe",
        "layer 3",
        "lfm.moe",
        edits.set_argument("lfm.moe", "layer 3", 1, lambda node: node.args[2]),
    ),
    Fault(
        "shares not normalized",
        "the weights of the selected experts do not sum to one",
        "lfm2_moe",
        "layer 1",
        "lfm.moe",
        edits.set_argument("lfm.moe", "layer 1", 7, False),
    ),
    Fault(
        "routing scale dropped",
        "the output of the experts is not multiplied by the routing scale",
        "lfm2_moe-scaled",
        "layer 2",
        "lfm.moe",
        edits.set_argument("lfm.moe", "layer 2", 8, 1.0),
    ),
    Fault(
        "one expert too few",
        "each token is sent to one expert fewer",
        "lfm2_moe",
        "layer 3",
        "lfm.moe",
        edits.set_argument("lfm.moe", "layer 3", 6, 1),
        # Core ML's interpreter reports the selected experts only if all layers select as many.
        targets=ALL - {"coreml"},
    ),
    Fault(
        "rope off by one",
        "each pair of dims is rotated by the angle of the next pair",
        "lfm2",
        "layer 1",
        "lfm.attention",
        edits.shift_rope,
    ),
    Fault(
        "sliding window off by one",
        "a sliding layer attends to one position too few",
        "lfm3",
        "layer 1",
        "lfm.attention",
        edits.set_argument("lfm.attention", "layer 1", 10, 7),
    ),
    Fault(
        "sliding window dropped",
        "a sliding layer attends to every position",
        "lfm3",
        "layer 1",
        "lfm.attention",
        edits.set_argument("lfm.attention", "layer 1", 10, 0),
    ),
    Fault(
        "q and k norms swapped",
        "queries are scaled by the gains of keys, and keys by the gains of queries",
        "lfm2",
        "layer 3",
        "lfm.attention",
        edits.swap_arguments("lfm.attention", "layer 3", 3, 4),
    ),
    Fault(
        "keys and values swapped",
        "the projections of keys and values are swapped",
        "lfm3",
        "layer 2",
        "lfm.attention",
        edits.swap_arguments("lfm.attention", "layer 2", 1, 2),
    ),
    Fault(
        "heads not gated",
        "the gate of the attention heads lacks its sigmoid",
        "lfm3",
        "layer 1",
        "aten.sigmoid",
        edits.drop_gate_sigmoid,
    ),
    Fault(
        "norm behind a block skipped",
        "the second norm of a sandwich is skipped",
        "lfm3",
        "layer 2",
        "lfm.rms_norm",
        edits.skip_operator("lfm.rms_norm", "layer 2", "post_ffn_norm"),
    ),
    Fault(
        "wrong epsilon",
        "a norm adds 1e-2 to the mean square, instead of 1e-5",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        edits.set_argument("lfm.add_rms_norm", "layer 2", 3, 1e-2, "operator_norm"),
    ),
    Fault(
        "residual lost",
        "the output of a block is added to itself instead of to the input of the block",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        edits.set_argument("lfm.add_rms_norm", "layer 2", 1, lambda node: node.args[0], "ffn_norm"),
    ),
    Fault(
        "gain of another layer",
        "a norm uses the gains of the previous layer",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        edits.use_gain_of_previous_layer,
    ),
    Fault(
        "stale conv state",
        "the state of a short convolution is returned without its update",
        "lfm2",
        "layer 0",
        "lfm.gated_short_conv",
        edits.return_stale_state("conv"),
        targets=FUNCTIONAL,
    ),
    Fault(
        "conv states exchanged",
        "two layers read each other's state in the next call",
        "lfm2",
        "layer 0",
        "lfm.gated_short_conv",
        edits.swap_conv_states,
        targets=FUNCTIONAL,
    ),
    Fault(
        "stale keys",
        "a cache of keys is returned without its update",
        "lfm2",
        "layer 1",
        "lfm.attention",
        edits.return_stale_state("key"),
        targets=FUNCTIONAL,
    ),
    Fault(
        "softmax router",
        "the scores of experts are a softmax instead of one sigmoid per expert",
        "lfm2_moe",
        "layer 2",
        "aten.sigmoid",
        edits.use_softmax_router,
        targets=frozenset({"onnx", "coreml", "mlir"}),
    ),
    Fault(
        "missing filter bias",
        "the short convolution has no bias",
        "lfm2-conv-bias",
        "layer 2",
        "lfm.gated_short_conv",
        edits.set_argument("lfm.gated_short_conv", "layer 2", 2, None),
    ),
    stored_fault(
        "dropped zero point",
        "codes are centered, and the zero points are ignored",
        "lfm2",
        "zeros",
        "layers.1.self_attn.q_proj",
        edits.drop_zero_point,
        targets=ALL - {"executorch"},  # XNNPACK has no zero points
    ),
    stored_fault(
        "scales one group off",
        "each group of a row has the scale of the previous group",
        "lfm2",
        "scales",
        "layers.0.conv.in_proj",
        edits.roll_scales,
    ),
    stored_fault(
        "scales one row off",
        "each row has the scales of the previous row",
        "lfm2",
        "scales",
        "layers.2.feed_forward.w2",
        edits.shift_scales_by_row,
    ),
    stored_fault(
        "wrong group order",
        "the groups of codes of each row are reversed",
        "lfm3",
        "codes",
        "layers.2.self_attn.o_proj",
        edits.reverse_groups,
    ),
    stored_fault(
        "nibbles swapped",
        "the two codes of each byte are swapped",
        "lfm2",
        "codes",
        "embed_tokens",
        edits.swap_nibbles,
    ),
    stored_fault(
        "codes of the other sign",
        "the highest bit of every code is flipped",
        "lfm2_moe",
        "codes",
        "layers.3.feed_forward.experts.4.w2",
        edits.flip_sign_bit,
    ),
    stored_fault(
        "experts exchanged",
        "two experts of a layer are swapped",
        "lfm2_moe",
        "codes",
        "layers.1.feed_forward.experts.0",
        sources=edits.swap_experts,
    ),
    stored_fault(
        "merged rows in another order",
        "in the merged matrix of q, k and v, v comes first",
        "lfm2",
        "codes",
        "layers.1.self_attn.q_proj",
        sources=edits.reverse_merged_rows,
    ),
    stored_fault(
        "transposed conv kernel",
        "the taps of a filter are reversed",
        "lfm2",
        "values",
        "layers.0.conv.conv",
        floats=lambda value: value.flip(-1),
    ),
    stored_fault(
        "rounded router",
        "the weights of the router are also rounded to bfloat16",
        "lfm2_moe",
        "values",
        "layers.2.feed_forward.gate",
        floats=lambda value: value.bfloat16().to(value.dtype),
    ),
    stored_fault(
        "centred gains",
        "the gains of a norm are stored minus one",
        "lfm2",
        "values",
        "layers.3.ffn_norm",
        floats=lambda value: value - 1,
    ),
)


def fault_table() -> str:
    """Return the faults as a Markdown table, for docs/parity.md."""
    lines = ["| fault | what is wrong | caught by | the place | targets |", "|---|---|---|---|---|"]
    for fault in FAULTS:
        gate = "read back" if fault.is_stored else "rung 3"
        where = f"the {fault.operator}" if fault.is_stored else f"`{fault.operator}`, {fault.part}"
        targets = "all" if fault.targets == ALL else ", ".join(sorted(fault.targets))
        lines.append(f"| {fault.name} | {fault.about} | {gate} | {where} | {targets} |")
    return "\n".join(lines)
