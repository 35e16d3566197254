"""The `lfm::` operators of a fused LFM graph.

Each operator has one definition in plain torch operators. The definition is the eager
implementation, the reference for every target, and (through `decompositions`) the replacement for
a target that does not support the operator.

Dims: B batch, T time, H hidden, K kv heads, C cache slots, D head dim, E experts, N tokens (B * T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import unpack_bits
from lfmc.model.attention import attend, attention_mask, write_cache
from lfmc.model.experts import choose_experts, mix_experts
from lfmc.model.rope import rotate, rotation

Fn = Callable[..., Any]


def _operator(name: str, shapes: Fn) -> Callable[[Fn], Any]:
    """Register a plain function as `lfm::name`; `shapes` returns empty results for tracing.

    Tracing through the function itself would take minutes for the experts of an 8B model.
    """

    def register(function: Fn) -> Any:
        op = torch.library.custom_op(f"lfm::{name}", function, mutates_args=())
        op.register_fake(shapes)
        _REFERENCES[name] = function
        return op

    return register


_REFERENCES: dict[str, Fn] = {}


@_operator("rms_norm", lambda x, weight, eps: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dim, in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


@_operator(
    "add_rms_norm", lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x))
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `rms_norm(residual + x)` and the sum `residual + x`."""
    total = residual + x
    y = total.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype), total


@_operator(
    "gated_short_conv",
    lambda bcx, weight, bias, state: (
        bcx.new_empty(*bcx.shape[:2], weight.shape[0]),
        torch.empty_like(state),
    ),
)
def gated_short_conv(
    bcx: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`C * causal_conv(B * x)`, where `bcx` `[B, T, 3H]` is B, C and x concatenated.

    `weight` is `[H, 1, taps]` and `bias` `[H]`. `state` `[B, H, taps - 1]` contains the last inputs
    of the filter. Return `[B, T, H]` and the new state.
    """
    gate, out_gate, value = bcx.transpose(1, 2).chunk(3, dim=1)
    inputs = torch.cat([state, gate * value], dim=2)
    mixed = F.conv1d(inputs, weight, bias, groups=weight.shape[0])
    y = (out_gate * mixed).transpose(1, 2).contiguous()
    return y, inputs[:, :, inputs.shape[2] - state.shape[2] :].clone()


@_operator(
    "attention",
    lambda q, k, v, q_norm, k_norm, inv_freq, positions, keys, values, eps, window, cache_write: (
        q.new_empty(*q.shape[:2], q.shape[2] // keys.shape[3], keys.shape[3]),
        torch.empty_like(keys),
        torch.empty_like(values),
    ),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    window: int,
    cache_write: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention over a cache, with q/k norm and rotary embedding.

    `q` `[B, T, heads * D]`, `k` and `v` `[B, T, K * D]` are outputs of their projections. Norms are
    `[D]`, `inv_freq` `[D / 2]`, `positions` `[T]`, `keys` and `values` `[B, K, C, D]`. `window` is
    the size of the sliding window, 0 for full attention. Return `[B, T, heads, D]` and the new
    caches.
    """
    head_dim = keys.shape[3]
    cos, sin = rotation(positions, inv_freq)
    q = _REFERENCES["rms_norm"](q.unflatten(-1, (-1, head_dim)), q_norm, eps).transpose(1, 2)
    k = _REFERENCES["rms_norm"](k.unflatten(-1, (-1, head_dim)), k_norm, eps).transpose(1, 2)
    v = v.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    keys = write_cache(keys, rotate(k, cos, sin), positions, cache_write)
    values = write_cache(values, v, positions, cache_write)
    mask = attention_mask(positions, keys.shape[2], window or None)
    y = attend(rotate(q, cos, sin), keys, values, mask)
    return y.contiguous(), keys, values


@_operator("swiglu", lambda gate, up: torch.empty_like(gate))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return F.silu(gate) * up


@_operator("moe", lambda x, *rest: torch.empty_like(x))
def moe(
    x: Tensor,
    scores: Tensor,
    choice: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Run the top-k experts on `x` `[N, H]`, chosen by `choice` and weighted by `scores` `[N, E]`.

    `w1[e]` and `w3[e]` are `[I, H]`, `w2[e]` `[H, I]`. `normalize` divides the chosen scores by
    their sum plus 1e-6, as transformers does.
    """
    expert_ids, weights = choose_experts(scores, choice, top_k, normalize, scale)
    return mix_experts(x, torch.zeros_like(scores).scatter(1, expert_ids, weights), w1, w3, w2)


@_operator(
    "dequantize",
    lambda codes, scales, zeros, bits, group, columns: scales.new_empty(
        scales.shape[0], columns, dtype=torch.float32
    ),
)
def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    """Dequantize packed codes: float32 `[rows, columns]`, `(code - zero) * scale` per group.

    `codes` are uint8 `[rows, bytes]`: a little-endian bit stream, rows padded to whole groups.
    `scales` are `[rows, groups]`. `zeros` are uint8 `[rows, groups]`, or None for `2^(bits - 1)`.
    If `group` is 0, each code is an index into its row of the palette `scales` `[rows, 2^bits]`.
    """
    if group == 0:
        return scales.float().gather(1, unpack_bits(codes, bits, columns).long())
    rows, groups = scales.shape
    q = unpack_bits(codes, bits, groups * group).view(rows, groups, group).float()
    zero = float(1 << (bits - 1)) if zeros is None else zeros.float().unsqueeze(-1)
    w = (q - zero) * scales.float().unsqueeze(-1)
    return w.view(rows, groups * group)[:, :columns].contiguous()


@_operator(
    "linear_nbits",
    lambda x, codes, scales, zeros, bias, bits, group, columns: x.new_empty(
        *x.shape[:-1], codes.shape[0]
    ),
)
def linear_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """`linear(x, dequantize(...), bias)`."""
    weight = _REFERENCES["dequantize"](codes, scales, zeros, bits, group, columns)
    return F.linear(x, weight.to(x.dtype), bias)


@_operator(
    "embedding_nbits",
    lambda ids, codes, scales, zeros, bits, group, columns: scales.new_empty(
        *ids.shape, columns, dtype=torch.float32
    ),
)
def embedding_nbits(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """Return rows `ids` of a quantized table, float32 `[..., columns]`; unpack only these rows."""
    flat = ids.flatten()
    rows: Tensor = _REFERENCES["dequantize"](
        codes[flat], scales[flat], None if zeros is None else zeros[flat], bits, group, columns
    )
    return rows.view(*ids.shape, columns)


def decompositions(*keep: str) -> dict[Any, Fn]:
    """Return a table for `ExportedProgram.run_decompositions` of all operators except `keep`."""
    return {
        getattr(torch.ops.lfm, name).default: function
        for name, function in _REFERENCES.items()
        if name not in keep
    }
