"""Handlers that write the program's operators in plain torch, one function per operator.

MLIR's compilers generate good code for these operations. A product of one token is elementwise
operators and one sum over the packed codes, which a compiler fuses into one loop. A product of more
tokens unpacks the matrix first and is a matmul. Experts are gathered, so that only the chosen ones
are read.
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
from lfmc.targets.shared.plain_torch import PASS_THROUGH, ConstantRef


def arange_int32(end: int) -> Tensor:
    """Return 0 to `end` as int32: TOSA supports no wider integers."""
    return torch.arange(end, dtype=torch.int32)


def _unpack_matrix(
    forms: Forms, units: Tensor, scales: Tensor, zeros: Tensor | None, format: Format
) -> Tensor:
    """Unpack a matrix, or gathered blocks of rows, to float32 `[N / 16, K, 16]`."""
    codes = forms.arithmetic.unpack(units, format.bits)  # (N / 16, G, 8, S, 16)
    signed = codes - _code_offset(forms, format, zeros, 2)
    value = signed * forms.widen(scales, "float16")[..., None, None, :]
    return value.flatten(-4, -2)


def _code_offset(forms: Forms, format: Format, zeros: Tensor | None, dims: int) -> Tensor | float:
    """Return the offset of codes: a number, or zero points with `dims` dims before the lanes."""
    if zeros is None:
        return float(1 << (format.bits - 1))
    value = forms.arithmetic.widen_zeros(zeros)
    for _ in range(dims):
        value = value.unsqueeze(-2)
    return value


def _multiply_vectors(
    forms: Forms,
    x: Tensor,
    units: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: Format,
) -> Tensor:
    """Multiply vectors `[..., K]`, each by its own matrix, to `[..., N]`.

    A product is one sum over the packed codes, or a matmul if the device computes such sums
    wrongly.
    """
    if not forms.arithmetic.sums:
        unpacked = _unpack_matrix(forms, units, scales, zeros, format)  # (..., N / 16, K, 16)
        matrix = unpacked.transpose(-3, -2).flatten(-2)
        product: Tensor = (x.unsqueeze(-2) @ matrix).squeeze(-2)
        return product
    offset = _code_offset(forms, format, zeros, 1)
    shape = (-1, EIGHTHS, format.group // EIGHTHS)
    parts = x.unflatten(-1, shape).unsqueeze(-1).unsqueeze(-5)  # (..., 1, G, 8, S, 1)
    total = None
    for eighth in range(EIGHTHS):
        codes = forms.arithmetic.unpack_eighth(units, format.bits, eighth)
        term = parts.select(-3, eighth) * (codes - offset)
        total = term if total is None else total + term
    assert total is not None
    scale = forms.widen(scales, "float16").unsqueeze(-2)
    result: Tensor = (total * scale).sum((-3, -2)).flatten(-2)
    return result


def _multiply(forms: Forms, x: Tensor, matrix: Matrix) -> Tensor:
    """Multiply `x` `[T, K]` by a matrix, to `[T, N]`."""
    units, scales = forms.load(matrix.codes), forms.load(matrix.scales)
    zeros, format = forms.zero_points(matrix), matrix.format
    if x.shape[0] == 1:
        return _multiply_vectors(forms, x[0], units, scales, zeros, format)[None]
    unpacked = _unpack_matrix(forms, units, scales, zeros, format)
    return x @ unpacked.permute(1, 0, 2).flatten(1)


def _embedding(
    forms: Forms, ids: Tensor, codes: ConstantRef, scales: Any, zeros: Any, *numbers: int
) -> Tensor:
    """Look up rows of a table: gather the block of each row, then select one lane."""
    matrix = forms.constants.matrix(codes.sources)
    block, lane = forms.arithmetic.block_and_lane(ids.flatten())
    zeros_by_block = forms.zero_points(matrix)
    rows = _unpack_matrix(
        forms,
        forms.load(matrix.codes).index_select(0, block),
        forms.load(matrix.scales).index_select(0, block),
        None if zeros_by_block is None else zeros_by_block.index_select(0, block),
        matrix.format,
    )
    return forms.arithmetic.select_lane(rows, lane).view(*ids.shape, -1)


def _linear(
    forms: Forms,
    x: Tensor,
    codes: ConstantRef,
    scales: Any,
    zeros: Any,
    bias: ConstantRef | None,
    *numbers: int,
) -> Tensor:
    y = _multiply(forms, x.flatten(0, -2), forms.constants.matrix(codes.sources))
    return forms.add_bias(y, bias).view(*x.shape[:-1], -1)


def _rms_norm(forms: Forms, x: Tensor, weight: ConstantRef, eps: float) -> Tensor:
    return _normalize(x, forms.floats(weight), eps)


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))


def _add_rms_norm(
    forms: Forms, x: Tensor, residual: Tensor, weight: ConstantRef, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return _normalize(total, forms.floats(weight), eps), total


def _swiglu(forms: Forms, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_short_conv(
    forms: Forms, bcx: Tensor, weight: ConstantRef, bias: ConstantRef | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    taps, tokens = forms.floats(weight, taps=True), bcx.shape[1]
    projection = bcx[0, 0] if tokens == 1 else bcx[0]  # (H) of one token, else (T, H)
    gate, out_gate, value = projection.chunk(3, -1)
    newest, state_size = gate * value, state.shape[0]
    if tokens == 1:
        inputs = [*state.unbind(), newest]
        new_state = torch.cat([state[1:], newest[None]])
    else:
        sequence = torch.cat([state, newest])
        inputs = [sequence[k : k + tokens] for k in range(state_size + 1)]
        new_state = sequence[tokens:]
    mixed = inputs[0] * taps[0]
    for part, tap in zip(inputs[1:], taps[1:], strict=True):
        mixed = mixed + part * tap
    return (out_gate * forms.add_bias(mixed, bias)).view(1, tokens, -1), new_state


def _attention(
    forms: Forms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: ConstantRef,
    k_norm: ConstantRef,
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
    cos_sin = rotation(positions, inv_freq)

    def normalize_and_rotate(x: Tensor, norm: ConstantRef) -> Tensor:
        rows = _normalize(x[0].unflatten(-1, (-1, dim)), forms.floats(norm), eps)
        return rotate(rows.transpose(0, 1), *cos_sin)  # (heads, T, D)

    put, start = forms.arithmetic.put, positions[:1]
    keys = put(keys, normalize_and_rotate(k, k_norm).transpose(1, 2), start, 2)
    values = put(values, v[0].unflatten(-1, (-1, dim)).transpose(0, 1), start, 1)
    # The queries of one key head are rows.
    rows = normalize_and_rotate(q, q_norm).reshape(heads, -1, dim)
    scores = (rows @ keys).view(heads, -1, count, context) * dim**-0.5
    visible = arange_int32(context) <= positions[:, None]
    mask = visible & (arange_int32(context) > positions[:, None] - window) if window else visible
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
    w1: Sequence[ConstantRef],
    w3: Sequence[ConstantRef],
    w2: Sequence[ConstantRef],
    top_k: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Run the chosen experts on `x` `[N, H]`.

    Every slot of every token gathers the matrices of its expert, once for each combination of
    formats in the layer.
    """
    expert_ids, shares = _choose_experts(scores, choice, top_k, normalize, scale)
    count, size = x.shape
    inputs = x[:, None].expand(count, top_k, size).reshape(-1, size)
    names = [
        tuple(matrix.sources[0] for matrix in matrices) for matrices in zip(w1, w3, w2, strict=True)
    ]
    total = None
    for positions_in_kind, experts in forms.constants.group_experts_by_format(names):
        indices, share = expert_ids.flatten(), shares.flatten()
        if len(experts) < len(names):
            make_table = partial(torch.tensor, positions_in_kind, dtype=torch.float32)
            table = forms.constants.config_constant(f"{experts[0][0]}#places", make_table)
            positions = forms.load(table).index_select(0, indices)
            indices = positions.clamp(min=0).to(torch.int32)
            share = share * (positions >= 0)
        w1_names, w3_names, w2_names = zip(*experts, strict=True)
        gate = F.silu(_multiply_experts(forms, inputs, indices, w1_names))
        inner = gate * _multiply_experts(forms, inputs, indices, w3_names)
        part = _multiply_experts(forms, inner, indices, w2_names) * share[:, None]
        total = part if total is None else total + part
    assert total is not None
    return total.view(count, top_k, -1).sum(1)


def _choose_experts(
    scores: Tensor, choice: Tensor, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts as `lfmc.model.experts.choose_experts` does, one maximum after the other."""
    experts = arange_int32(choice.shape[1])
    expert_ids, weights = [], []
    for _ in range(top_k):
        best = choice.argmax(-1, keepdim=True).to(torch.int32)
        selected = experts == best
        expert_ids.append(best)
        weights.append((scores * selected).sum(-1, keepdim=True))
        choice = torch.where(selected, -1e30, choice)
    shares = torch.cat(weights, 1)
    if normalize:
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-6)
    return torch.cat(expert_ids, 1), shares * scale


def _multiply_experts(forms: Forms, x: Tensor, indices: Tensor, names: tuple[str, ...]) -> Tensor:
    """Multiply `x` `[M, K]` by the experts `indices` `[M]`, which index `names`."""
    constants = forms.constants
    if not isinstance(constants.weights.format(names[0]), Format):
        parameter = constants.float_stack(names)
        weights = forms.widen(forms.load(parameter).index_select(0, indices), parameter.dtype)
        return (weights * x[:, None]).sum(-1)
    matrix = constants.stack(names)
    zeros = forms.zero_points(matrix)
    return _multiply_vectors(
        forms,
        x,
        forms.load(matrix.codes).index_select(0, indices),
        forms.load(matrix.scales).index_select(0, indices),
        None if zeros is None else zeros.index_select(0, indices),
        matrix.format,
    )


HANDLERS: Mapping[str, Callable[..., Any]] = {
    **PASS_THROUGH,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.embedding_nbits": _embedding,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear,
    "lfm.moe": _moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
