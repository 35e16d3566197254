"""Operators of the program in forms that accelerators support: a table of one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.targets.npu.forms import Forms, Rope, State
from lfmc.targets.npu.interface import mask_name
from lfmc.targets.npu.names import BELOW, INVERSE, MASKED, POWERS, ROOT, SCALED, SIGMOID
from lfmc.targets.shared.plain_torch import PASS_THROUGH, ConstantRef


def _embedding(forms: Forms, *rest: Any) -> Tensor:
    return forms.inputs["hidden"]


def _linear(
    forms: Forms, x: Tensor, weight: ConstantRef, bias: ConstantRef | None = None
) -> Tensor | list[Tensor]:
    """Multiply by each of the merged matrices separately; the split behind them is dropped."""
    biases = bias.sources if bias else [None] * len(weight.sources)
    parts = []
    for index, (matrix_name, bias_name) in enumerate(zip(weight.sources, biases, strict=True)):
        part = f"{index}" if len(biases) > 1 else ""
        matrix = ConstantRef((matrix_name,), weight.part)
        y = forms.linear(x, matrix, f"product{part}" if bias_name or part else "")
        if bias_name is not None:
            y = forms.round(y + forms.load_constant(ConstantRef((bias_name,))), part)
        parts.append(y)
    return parts[0] if len(parts) == 1 else parts


def _linear_nbits(
    forms: Forms,
    x: Tensor,
    codes: ConstantRef,
    scales: Any,
    zeros: Any,
    bias: ConstantRef | None,
    *numbers: int,
) -> Tensor | list[Tensor]:
    return _linear(forms, x, codes, bias)


def _split(forms: Forms, merged: list[Tensor], *sizes: Any) -> list[Tensor]:
    return merged


def _rms_norm(forms: Forms, x: Tensor, weight: ConstantRef, eps: float, part: str = "") -> Tensor:
    if not forms.style.by_parts:
        return forms.round(F.rms_norm(x, x.shape[-1:], forms.load_constant(weight), eps), part)
    square = forms.round(x * x, f"{part}square")
    total = forms.round(square.sum(-1, keepdim=True), f"{part}squares")
    mean = forms.round(total * forms.scalar(1 / x.shape[-1]), f"{part}mean")
    mean = forms.round(mean + forms.scalar(eps), f"{part}above_zero")
    root = forms.round(torch.rsqrt(mean), part + ROOT)
    return forms.round(forms.round(x * root, f"{part}normal") * forms.load_constant(weight), part)


def _add_rms_norm(
    forms: Forms, x: Tensor, residual: Tensor, weight: ConstantRef, eps: float
) -> tuple[Tensor, Tensor]:
    total = forms.round(residual + x, "sum")
    return _rms_norm(forms, total, weight, eps), total


def _silu(forms: Forms, x: Tensor, part: str) -> Tensor:
    gate = forms.round(torch.sigmoid(x), f"{part}{SIGMOID}")
    return forms.round(x * gate, f"{part}silu")


def _swiglu(forms: Forms, gate: Tensor, up: Tensor) -> Tensor:
    return forms.round(_silu(forms, gate, "") * up)


def _gated_short_conv(
    forms: Forms, bcx: Tensor, weight: ConstantRef, bias: ConstantRef | None, state: State
) -> tuple[Tensor, Tensor]:
    gate, out_gate, value = bcx.chunk(3, -1)
    new = forms.round_state(gate * value, state).transpose(1, 2)  # (1, H, T)
    window, taps = torch.cat([state.value, new], 2), forms.load_constant(weight)
    mixed = _filter(forms, window, taps).transpose(1, 2)
    if bias is not None:
        mixed = forms.round(mixed + forms.load_constant(bias), "biased")
    return forms.round(out_gate * mixed), new


def _filter(forms: Forms, window: Tensor, taps: Tensor) -> Tensor:
    """Filter each channel of `window` `[1, H, taps - 1 + T]`; return `[1, H, T]`."""
    if not forms.style.by_taps:
        return forms.round(F.conv1d(window, taps, groups=taps.shape[0]), "conv")
    count, total = forms.interface.tokens, None
    for index in range(taps.shape[2]):
        part = window[..., index : index + count] * taps[:, 0, index : index + 1]
        part = forms.round(part, f"tap{index}")
        total = part if total is None else forms.round(total + part, f"sum{index}")
    assert total is not None
    return total


def _attention(
    forms: Forms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: ConstantRef,
    k_norm: ConstantRef,
    rope: Rope,
    positions: None,
    keys: State,
    values: State,
    eps: float,
    window: int,
    cache_write: str,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, context = keys.value.shape
    count = q.shape[1]

    def norm_and_rotate(
        x: Tensor, norm: ConstantRef, part: str, round_result: Callable[[Tensor], Tensor]
    ) -> Tensor:
        # With two dims: QNN's norm of three dims is silently wrong from 16 tokens on.
        rows = _rms_norm(forms, x.view(-1, dim), norm, eps, f"{part}norm")
        rows = rows.view(count, -1, dim).transpose(0, 1)
        return _rotate(forms, rows, rope, part, round_result)  # (heads, T, D)

    new_keys = norm_and_rotate(k, k_norm, "k_", lambda x: forms.round_state(x, keys)).transpose(
        1, 2
    )
    new_values = forms.round_state(v, values).view(count, heads, dim).transpose(0, 1)
    queries = norm_and_rotate(q, q_norm, "q_", lambda x: forms.round(x, "q_turned"))
    rows = queries.reshape(heads, -1, dim)  # queries that share a key are rows
    scores = forms.round(torch.bmm(rows, torch.cat([keys.value, new_keys], 2)), "scores")
    scores = scores.view(heads, -1, count, context + count)
    scores = forms.round(scores * forms.scalar(dim**-0.5), SCALED)
    scores = forms.round(scores + forms.inputs[mask_name(window)], MASKED)
    shares = _softmax(forms, scores).view(heads, -1, context + count)
    mixed = forms.round(torch.bmm(shares, torch.cat([values.value, new_values], 1)))
    mixed = mixed.view(-1, count, dim)
    return mixed.transpose(0, 1).unsqueeze(0), new_keys, new_values


def _softmax(forms: Forms, scores: Tensor) -> Tensor:
    if not forms.style.by_parts:
        return forms.round(torch.softmax(scores, -1), "shares")
    below = forms.round(scores - scores.amax(-1, keepdim=True), BELOW)
    powers = forms.round(torch.exp(below), POWERS)
    total = forms.round(powers.sum(-1, keepdim=True), "total")
    return forms.round(_divide(forms, powers, total), "shares")


def _divide(forms: Forms, x: Tensor, total: Tensor) -> Tensor:
    """Return a quotient, not yet rounded; `by_parts` multiplies by the reciprocal."""
    if not forms.style.by_parts:
        return x / total
    return x * forms.round(torch.reciprocal(total), INVERSE)


def _rotate(
    forms: Forms, x: Tensor, rope: Rope, part: str, round_result: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rotate both halves of a head by the host's angles, and join them.

    Both halves have one step, because they end in one tensor.
    """
    cos, sin = (forms.inputs[f"{name}_{rope.kind}"] for name in ("cos", "sin"))
    first, second = x.chunk(2, -1)

    def product(x: Tensor, table: Tensor, name: str) -> Tensor:
        return forms.round(x * table, f"{part}{name}")

    low = round_result(product(first, cos, "ac") - product(second, sin, "bs"))
    high = round_result(product(second, cos, "bc") + product(first, sin, "as"))
    return torch.cat([low, high], -1)


def _smallest_of_top_k(forms: Forms, choice: Tensor, top_k: int) -> Tensor:
    """Return the smallest of the `top_k` largest scores; `by_parts` counts equal scores once."""
    if not forms.style.by_parts:
        return torch.topk(choice, top_k, -1).values[:, -1:]
    lowest = choice.amin(-1, keepdim=True)
    for _ in range(top_k - 1):
        choice = torch.where(choice >= choice.amax(-1, keepdim=True), lowest, choice)
    return choice.amax(-1, keepdim=True)


def _moe(
    forms: Forms,
    x: Tensor,
    scores: Tensor,
    choice: Tensor,
    w1: Sequence[ConstantRef],
    w3: Sequence[ConstantRef],
    w2: Sequence[ConstantRef],
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Compute every expert for every token, times its share, which is 0 for unselected experts.

    With rounded values, experts that tie with the last selected expert are selected as well.
    """
    threshold = _smallest_of_top_k(forms, choice, top_k)
    part_name = "own"
    if forms.style.by_parts:  # both operands of a `where`, and its result, have one step
        part_name = "scores"
        scores = forms.round(scores, part_name)
    shares = torch.where(choice >= threshold, scores, forms.zero(part_name))
    shares = forms.round(shares, part_name)
    if normalize:
        total = forms.round(shares.sum(-1, keepdim=True), "sum")
        total = forms.round(total + forms.scalar(1e-6), "total")
        shares = forms.round(_divide(forms, shares, total), "shares")
    if scale != 1.0:
        shares = forms.round(shares * forms.scalar(scale), "scaled")
    experts = zip(shares.chunk(len(w1), -1), w1, w3, w2, strict=True)
    result: Tensor | None = None
    for index, (share, expert_w1, expert_w3, expert_w2) in enumerate(experts):

        def linear(x: Tensor, weight: ConstantRef, part: str, index: int = index) -> Tensor:
            return forms.linear(x, weight, f"{index}_{part}")

        gate = _silu(forms, linear(x, expert_w1, "w1"), f"{index}_")
        inner = forms.round(gate * linear(x, expert_w3, "w3"), f"{index}_inner")
        part = forms.round(linear(inner, expert_w2, "w2") * share, f"{index}_share")
        result = part if result is None else forms.round(result + part, f"{index}_sum")
    assert result is not None
    return result


HANDLERS: Mapping[str, Callable[..., Any]] = {
    **PASS_THROUGH,
    "aten.embedding": _embedding,
    "aten.linear": _linear,
    "aten.split_with_sizes": _split,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.embedding_nbits": _embedding,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": _moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
