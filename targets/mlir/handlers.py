"""Forms of the program's operators that MLIR's compilers make good code of: one function each.

A product of one token is elementwise operators and one sum over the packed codes themselves, which
a compiler fuses into one loop; of more tokens it is a matmul of a matrix that is unpacked first.
Experts are gathered: only the chosen ones are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.model.rope import rotate, rotation
from lfmc.targets.mlir.constants import Matrix
from lfmc.targets.mlir.forms import Forms
from lfmc.targets.mlir.layout import EIGHTHS
from lfmc.targets.shared.plain_torch import PASSED, Held


def up_to(end: int) -> Tensor:
    """0 to `end`, int32: TOSA has no wider integers."""
    return torch.arange(end, dtype=torch.int32)


def _whole(
    forms: Forms, units: Tensor, scales: Tensor, zeros: Tensor | None, format: Format
) -> Tensor:
    """A matrix, or rows of blocks: float32 `[N / 16, K, 16]`."""
    codes = forms.dialect.spread(units, format.bits)  # (N / 16, G, 8, S, 16)
    centred = codes - _middle(forms, format, zeros, 2)
    value = centred * forms.wide(scales, "float16")[..., None, None, :]
    return value.flatten(-4, -2)


def _middle(forms: Forms, format: Format, zeros: Tensor | None, dims: int) -> Tensor | float:
    """What is taken from codes: zero points with `dims` more dims before the lanes, or a number."""
    if zeros is None:
        return float(1 << (format.bits - 1))
    value = forms.dialect.number(zeros)
    for _ in range(dims):
        value = value.unsqueeze(-2)
    return value


def _vectors(
    forms: Forms,
    x: Tensor,
    units: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: Format,
) -> Tensor:
    """Products `[..., N]` of vectors `[..., K]`, each with a matrix of its own: one sum over the
    codes as they lie, or, where a device gets such sums wrong, matmuls."""
    if not forms.dialect.sums:
        whole = _whole(forms, units, scales, zeros, format)  # (..., N / 16, K, 16)
        matrix = whole.transpose(-3, -2).flatten(-2)
        product: Tensor = (x.unsqueeze(-2) @ matrix).squeeze(-2)
        return product
    middle = _middle(forms, format, zeros, 1)
    shape = (-1, EIGHTHS, format.group // EIGHTHS)
    parts = x.unflatten(-1, shape).unsqueeze(-1).unsqueeze(-5)  # (..., 1, G, 8, S, 1)
    total = None
    for eighth in range(EIGHTHS):
        codes = forms.dialect.eighth(units, format.bits, eighth)
        term = parts.select(-3, eighth) * (codes - middle)
        total = term if total is None else total + term
    assert total is not None
    scale = forms.wide(scales, "float16").unsqueeze(-2)
    found: Tensor = (total * scale).sum((-3, -2)).flatten(-2)
    return found


def _product(forms: Forms, x: Tensor, matrix: Matrix) -> Tensor:
    """`x` `[T, K]` times a matrix, `[T, N]`."""
    units, scales = forms.given(matrix.codes), forms.given(matrix.scales)
    zeros, format = forms.zeros(matrix), matrix.format
    if x.shape[0] == 1:
        return _vectors(forms, x[0], units, scales, zeros, format)[None]
    whole = _whole(forms, units, scales, zeros, format)
    return x @ whole.permute(1, 0, 2).flatten(1)


def _embedding(
    forms: Forms, ids: Tensor, codes: Held, scales: Any, zeros: Any, *numbers: int
) -> Tensor:
    """Rows of a table: the block of each, of which one lane is kept."""
    matrix = forms.constants.matrix(codes.sources)
    block, lane = forms.dialect.block_and_lane(ids.flatten())
    points = forms.zeros(matrix)
    rows = _whole(
        forms,
        forms.given(matrix.codes).index_select(0, block),
        forms.given(matrix.scales).index_select(0, block),
        None if points is None else points.index_select(0, block),
        matrix.format,
    )
    return forms.dialect.pick(rows, lane).view(*ids.shape, -1)


def _linear(
    forms: Forms,
    x: Tensor,
    codes: Held,
    scales: Any,
    zeros: Any,
    bias: Held | None,
    *numbers: int,
) -> Tensor:
    y = _product(forms, x.flatten(0, -2), forms.constants.matrix(codes.sources))
    return forms.biased(y, bias).view(*x.shape[:-1], -1)


def _rms_norm(forms: Forms, x: Tensor, weight: Held, eps: float) -> Tensor:
    return _normalized(x, forms.floats(weight), eps)


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))


def _add_rms_norm(
    forms: Forms, x: Tensor, residual: Tensor, weight: Held, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return _normalized(total, forms.floats(weight), eps), total


def _swiglu(forms: Forms, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_short_conv(
    forms: Forms, bcx: Tensor, weight: Held, bias: Held | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    taps, count = forms.floats(weight, taps=True), bcx.shape[1]
    rows = bcx[0, 0] if count == 1 else bcx[0]  # (H) of one token, else (T, H)
    gate, out_gate, value = rows.chunk(3, -1)
    newest, back = gate * value, state.shape[0]
    if count == 1:
        seen = [*state.unbind(), newest]
        after = torch.cat([state[1:], newest[None]])
    else:
        whole = torch.cat([state, newest])
        seen = [whole[k : k + count] for k in range(back + 1)]
        after = whole[count:]
    mixed = seen[0] * taps[0]
    for part, tap in zip(seen[1:], taps[1:], strict=True):
        mixed = mixed + part * tap
    return (out_gate * forms.biased(mixed, bias)).view(1, count, -1), after


def _attention(
    forms: Forms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Held,
    k_norm: Held,
    inv_freq: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    window: int,
    cache_write: str,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, context = keys.shape
    count = q.shape[1]
    turns = rotation(positions, inv_freq)

    def turned(x: Tensor, norm: Held) -> Tensor:
        rows = _normalized(x[0].unflatten(-1, (-1, dim)), forms.floats(norm), eps)
        return rotate(rows.transpose(0, 1), *turns)  # (heads, T, D)

    put, start = forms.dialect.put, positions[:1]
    keys = put(keys, turned(k, k_norm).transpose(1, 2), start, 2)
    values = put(values, v[0].unflatten(-1, (-1, dim)).transpose(0, 1), start, 1)
    rows = turned(q, q_norm).reshape(heads, -1, dim)  # queries that share a key are rows
    scores = (rows @ keys).view(heads, -1, count, context) * dim**-0.5
    seen = up_to(context) <= positions[:, None]
    mask = seen & (up_to(context) > positions[:, None] - window) if window else seen
    scores = torch.where(mask, scores, -1e30)
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    shares = powers / powers.sum(-1, keepdim=True)
    mixed = (shares.view(heads, -1, context) @ values).view(-1, count, dim)
    return mixed.transpose(0, 1)[None], keys, values


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
    """`x` `[N, H]`; every place of every token gathers its expert's matrices, once for each
    combination of formats that the layer's experts have."""
    chosen, shares = _choose(scores, choice, top_k, normalize, scale)
    count, size = x.shape
    inputs = x[:, None].expand(count, top_k, size).reshape(-1, size)
    names = [tuple(own.sources[0] for own in three) for three in zip(w1, w3, w2, strict=True)]
    total = None
    for members, own in forms.constants.expert_kinds(names):
        place, share = chosen.flatten(), shares.flatten()
        if len(own) < len(names):
            make = partial(torch.tensor, members, dtype=torch.float32)
            table = forms.constants.of_config(f"{own[0][0]}#places", make)
            found = forms.given(table).index_select(0, place)
            place = found.clamp(min=0).to(torch.int32)
            share = share * (found >= 0)
        one, three, two = zip(*own, strict=True)
        inner = F.silu(_experts(forms, inputs, place, one)) * _experts(forms, inputs, place, three)
        part = _experts(forms, inner, place, two) * share[:, None]
        total = part if total is None else total + part
    assert total is not None
    return total.view(count, top_k, -1).sum(1)


def _choose(
    scores: Tensor, choice: Tensor, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """What `lfmc.model.experts.choose_experts` does, one maximum after the other."""
    experts = up_to(choice.shape[1])
    chosen, weights = [], []
    for _ in range(top_k):
        best = choice.argmax(-1, keepdim=True).to(torch.int32)
        own = experts == best
        chosen.append(best)
        weights.append((scores * own).sum(-1, keepdim=True))
        choice = torch.where(own, -1e30, choice)
    shares = torch.cat(weights, 1)
    if normalize:
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-6)
    return torch.cat(chosen, 1), shares * scale


def _experts(forms: Forms, x: Tensor, place: Tensor, names: tuple[str, ...]) -> Tensor:
    """Products of `x` `[M, K]` with the experts at `place` `[M]` among those of `names`."""
    constants = forms.constants
    if not isinstance(constants.weights.format(names[0]), Format):
        own = constants.float_stack(names)
        weights = forms.wide(forms.given(own).index_select(0, place), own.dtype)
        return (weights * x[:, None]).sum(-1)
    matrix = constants.stack(names)
    zeros = forms.zeros(matrix)
    return _vectors(
        forms,
        x,
        forms.given(matrix.codes).index_select(0, place),
        forms.given(matrix.scales).index_select(0, place),
        None if zeros is None else zeros.index_select(0, place),
        matrix.format,
    )


HANDLERS: Mapping[str, Callable[..., Any]] = {
    **PASSED,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.embedding_nbits": _embedding,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear,
    "lfm.moe": _moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
