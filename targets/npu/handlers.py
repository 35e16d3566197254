"""Operators of the program in forms that accelerators take: one function each, in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.targets.npu.forms import Forms, Rope, State
from lfmc.targets.npu.interface import mask_name
from lfmc.targets.npu.names import BELOW, INVERSE, MASKED, POWERS, ROOT, SCALED, SIGMOID
from lfmc.targets.shared.plain_torch import PASSED, Held


def _embedding(forms: Forms, *rest: Any) -> Tensor:
    return forms.inputs["hidden"]


def _linear(
    forms: Forms, x: Tensor, weight: Held, bias: Held | None = None
) -> Tensor | list[Tensor]:
    """Of matrices that a pass has merged, each alone: what follows takes them apart again."""
    biases = bias.sources if bias else [None] * len(weight.sources)
    parts = []
    for index, (matrix, own) in enumerate(zip(weight.sources, biases, strict=True)):
        part = f"{index}" if len(biases) > 1 else ""
        alone = Held((matrix,), weight.part)
        y = forms.product(x, alone, f"product{part}" if own or part else "")
        parts.append(y if own is None else forms.keep(y + forms.small(Held((own,))), part))
    return parts[0] if len(parts) == 1 else parts


def _linear_nbits(
    forms: Forms, x: Tensor, codes: Held, scales: Any, zeros: Any, bias: Held | None, *numbers: int
) -> Tensor | list[Tensor]:
    return _linear(forms, x, codes, bias)


def _split(forms: Forms, merged: list[Tensor], *sizes: Any) -> list[Tensor]:
    return merged


def _rms_norm(forms: Forms, x: Tensor, weight: Held, eps: float, part: str = "") -> Tensor:
    if not forms.style.by_parts:
        return forms.keep(F.rms_norm(x, x.shape[-1:], forms.small(weight), eps), part)
    square = forms.keep(x * x, f"{part}square")
    total = forms.keep(square.sum(-1, keepdim=True), f"{part}squares")
    mean = forms.keep(total * forms.number(1 / x.shape[-1]), f"{part}mean")
    mean = forms.keep(mean + forms.number(eps), f"{part}above_zero")
    root = forms.keep(torch.rsqrt(mean), part + ROOT)
    return forms.keep(forms.keep(x * root, f"{part}normal") * forms.small(weight), part)


def _add_rms_norm(
    forms: Forms, x: Tensor, residual: Tensor, weight: Held, eps: float
) -> tuple[Tensor, Tensor]:
    total = forms.keep(residual + x, "sum")
    return _rms_norm(forms, total, weight, eps), total


def _silu(forms: Forms, x: Tensor, part: str) -> Tensor:
    gate = forms.keep(torch.sigmoid(x), f"{part}{SIGMOID}")
    return forms.keep(x * gate, f"{part}silu")


def _swiglu(forms: Forms, gate: Tensor, up: Tensor) -> Tensor:
    return forms.keep(_silu(forms, gate, "") * up)


def _gated_short_conv(
    forms: Forms, bcx: Tensor, weight: Held, bias: Held | None, state: State
) -> tuple[Tensor, Tensor]:
    gate, out_gate, value = bcx.chunk(3, -1)
    new = forms.added(gate * value, state).transpose(1, 2)  # (1, H, T)
    seen, taps = torch.cat([state.value, new], 2), forms.small(weight)
    mixed = _filtered(forms, seen, taps).transpose(1, 2)
    if bias is not None:
        mixed = forms.keep(mixed + forms.small(bias), "biased")
    return forms.keep(out_gate * mixed), new


def _filtered(forms: Forms, seen: Tensor, taps: Tensor) -> Tensor:
    """`seen` `[1, H, taps - 1 + T]` through a filter for each channel: `[1, H, T]`."""
    if not forms.style.by_taps:
        return forms.keep(F.conv1d(seen, taps, groups=taps.shape[0]), "conv")
    count, total = forms.interface.tokens, None
    for index in range(taps.shape[2]):
        part = seen[..., index : index + count] * taps[:, 0, index : index + 1]
        part = forms.keep(part, f"tap{index}")
        total = part if total is None else forms.keep(total + part, f"sum{index}")
    assert total is not None
    return total


def _attention(
    forms: Forms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Held,
    k_norm: Held,
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

    def turned(x: Tensor, norm: Held, part: str, keep: Callable[[Tensor], Tensor]) -> Tensor:
        # In two dims: QNN's norm of three is wrong from 16 tokens on, without a word.
        rows = _rms_norm(forms, x.view(-1, dim), norm, eps, f"{part}norm")
        rows = rows.view(count, -1, dim).transpose(0, 1)
        return _rotate(forms, rows, rope, part, keep)  # (heads, T, D)

    new_keys = turned(k, k_norm, "k_", lambda x: forms.added(x, keys)).transpose(1, 2)
    new_values = forms.added(v, values).view(count, heads, dim).transpose(0, 1)
    queries = turned(q, q_norm, "q_", lambda x: forms.keep(x, "q_turned"))
    rows = queries.reshape(heads, -1, dim)  # those that share a key are rows
    scores = forms.keep(torch.bmm(rows, torch.cat([keys.value, new_keys], 2)), "scores")
    scores = scores.view(heads, -1, count, context + count)
    scores = forms.keep(scores * forms.number(dim**-0.5), SCALED)
    scores = forms.keep(scores + forms.inputs[mask_name(window)], MASKED)
    shares = _softmax(forms, scores).view(heads, -1, context + count)
    mixed = forms.keep(torch.bmm(shares, torch.cat([values.value, new_values], 1)))
    mixed = mixed.view(-1, count, dim)
    return mixed.transpose(0, 1).unsqueeze(0), new_keys, new_values


def _softmax(forms: Forms, scores: Tensor) -> Tensor:
    if not forms.style.by_parts:
        return forms.keep(torch.softmax(scores, -1), "shares")
    below = forms.keep(scores - scores.amax(-1, keepdim=True), BELOW)
    powers = forms.keep(torch.exp(below), POWERS)
    total = forms.keep(powers.sum(-1, keepdim=True), "total")
    return forms.keep(_over(forms, powers, total), "shares")


def _over(forms: Forms, x: Tensor, total: Tensor) -> Tensor:
    """A quotient, not yet kept; by parts, a product with the inverse."""
    if not forms.style.by_parts:
        return x / total
    return x * forms.keep(torch.reciprocal(total), INVERSE)


def _rotate(
    forms: Forms, x: Tensor, rope: Rope, part: str, keep: Callable[[Tensor], Tensor]
) -> Tensor:
    """Both halves of a head turned by the host's angles, and kept alike, as they are joined."""
    cos, sin = (forms.inputs[f"{name}_{rope.kind}"] for name in ("cos", "sin"))
    first, second = x.chunk(2, -1)

    def product(x: Tensor, table: Tensor, name: str) -> Tensor:
        return forms.keep(x * table, f"{part}{name}")

    low = keep(product(first, cos, "ac") - product(second, sin, "bs"))
    high = keep(product(second, cos, "bc") + product(first, sin, "as"))
    return torch.cat([low, high], -1)


def _last_chosen(forms: Forms, choice: Tensor, top_k: int) -> Tensor:
    """The least of the `top_k` largest; by parts, of so many that differ."""
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
    w1: Sequence[Held],
    w3: Sequence[Held],
    w2: Sequence[Held],
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Every expert of every token, times its share, which is zero of those not chosen. Where values
    are rounded, experts that tie with the last of those chosen are chosen, too."""
    least = _last_chosen(forms, choice, top_k)
    own_part = "own"
    if forms.style.by_parts:  # both sides of a choice, and what it gives, have one step
        own_part = "scores"
        scores = forms.keep(scores, own_part)
    own = forms.keep(torch.where(choice >= least, scores, forms.zero(own_part)), own_part)
    if normalize:
        total = forms.keep(own.sum(-1, keepdim=True), "sum")
        total = forms.keep(total + forms.number(1e-6), "total")
        own = forms.keep(_over(forms, own, total), "shares")
    if scale != 1.0:
        own = forms.keep(own * forms.number(scale), "scaled")
    parts = zip(own.chunk(len(w1), -1), w1, w3, w2, strict=True)
    sum_of_all: Tensor | None = None
    for index, (share, one, three, two) in enumerate(parts):

        def product(x: Tensor, weight: Held, part: str, index: int = index) -> Tensor:
            return forms.product(x, weight, f"{index}_{part}")

        gate = _silu(forms, product(x, one, "w1"), f"{index}_")
        inner = forms.keep(gate * product(x, three, "w3"), f"{index}_inner")
        part = forms.keep(product(inner, two, "w2") * share, f"{index}_share")
        sum_of_all = part if sum_of_all is None else forms.keep(sum_of_all + part, f"{index}_sum")
    assert sum_of_all is not None
    return sum_of_all


HANDLERS: Mapping[str, Callable[..., Any]] = {
    **PASSED,
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
