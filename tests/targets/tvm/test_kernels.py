"""Kernels alone, against the operators' definitions in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.graph.ops import _REFERENCES
from lfmc.targets.shared.rounded_program import round_groups
from lfmc.targets.tvm.compile import target_of
from lfmc.targets.tvm.kernels import attention, routing
from lfmc.targets.tvm.kernels.builder import Columns
from lfmc.targets.tvm.kernels.cpus import CPUS, Cpu, machine_flags, this_cpu
from lfmc.targets.tvm.kernels.embedding import embedding_nbits
from lfmc.targets.tvm.kernels.gated_short_conv import gated_short_conv
from lfmc.targets.tvm.kernels.layout import pack_codes, pack_groups, pack_zeros
from lfmc.targets.tvm.kernels.linear import linear
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.round_rows import round_rows

FAMILIES = [
    pytest.param(
        cpu,
        marks=pytest.mark.skipif(
            not machine_flags().issuperset(cpu.flags), reason=f"this CPU has no {cpu.name}"
        ),
        id=cpu.name,
    )
    for cpu in CPUS.values()
]


def run(
    make: Callable[..., Any],
    *args: Any,
    given: Sequence[Tensor],
    cpu: Cpu | None = None,
    results: Sequence[Tensor],
    **named: Any,
) -> None:
    """Build a kernel and call it; `results` are written."""
    key = tuple(sorted(named.items()))
    buffers = [tvm.runtime.from_dlpack(t.contiguous()) for t in given]
    _built(make, args, key, cpu or this_cpu())(
        *buffers, *(tvm.runtime.from_dlpack(t) for t in results)
    )


@lru_cache
def _built(make: Any, args: Any, named: Any, cpu: Cpu) -> Any:
    function = make(*args, **dict(named)).with_attr("global_symbol", "kernel")
    return tvm.compile(tvm.IRModule({"kernel": function}), target_of(cpu))["kernel"]


def packed(format: Format, rows: int, columns: int, seed: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // format.group

    def draw(size: int) -> Tensor:
        shape = (rows, size)
        return torch.randint(1 << format.bits, shape, generator=generator, dtype=torch.uint8)

    scales = (torch.rand(rows, groups, generator=generator) * 0.1 - 0.03).half()
    zeros = None if format.symmetric else draw(groups)
    return PackedTensor(format, (rows, columns), draw(columns), scales, zeros)


def constants(matrix: PackedTensor) -> list[Tensor]:
    bits = matrix.format.bits
    found = [pack_codes(matrix.codes, bits).view(torch.uint32), pack_groups(matrix.scales)]
    if matrix.zeros is not None:
        found.append(pack_zeros(matrix.zeros, bits))
    return [value.unsqueeze(0) for value in found]


def rounded(x: Tensor, group: int) -> list[Tensor]:
    """What a product takes, by the kernel that rounds."""
    count, size = x.shape
    groups = size // group
    found = [
        torch.empty(count, size // 4, dtype=torch.int32),
        torch.empty(count, groups),
        torch.empty(count, groups, dtype=torch.int32),
    ]
    run(round_rows, size, group, None, given=[x], results=found)
    return found


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_activations_are_rounded_as_the_reference_says(group: int) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 256)
    x[2] = 0
    words, steps, sums = rounded(x, group)
    codes = words.view(torch.int8).float()
    own = (codes.view(5, -1, group) * steps.unsqueeze(-1)).flatten(1)
    assert torch.equal(own, round_groups(x, group))
    assert torch.equal(sums, codes.view(5, -1, group).sum(-1).int())
    assert not codes[2].any()
    assert int(codes.abs().max()) == 127


@pytest.mark.parametrize("cpu", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_every_width_and_family(cpu: Cpu, bits: int, symmetric: bool) -> None:
    """Rows that fill no block, tokens that fill no tile, a bias, the largest codes."""
    format = Format(bits, 32 if symmetric else 64, symmetric, "float16")
    matrix, bias = packed(format, 38, 128), torch.randn(38)
    matrix.codes[0] = (1 << bits) - 1
    x = torch.randn(cpu.tile + 3, 128, generator=torch.Generator().manual_seed(2))
    x[0] = 1.0  # all codes 127
    expected = round_groups(x, format.group) @ matrix.dequantize().T + bias
    found = torch.empty(len(x), 38)
    args = (format, 6, cpu, None)
    given = [*rounded(x, format.group), *constants(matrix), bias]
    run(linear, *args, given=given, cpu=cpu, results=[found], bias="float32", exact=False)
    assert apart(found, expected) < 1e-6
    one = torch.empty(1, 38)
    given = [*rounded(x[:1], format.group), *constants(matrix), bias]
    run(linear, format, 6, cpu, 1, given=given, cpu=cpu, results=[one], bias="float32", exact=False)
    assert apart(one, expected[:1]) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_with_float_activations(bits: int, symmetric: bool) -> None:
    format = Format(bits, 32, symmetric, "float16")
    matrix, x = packed(format, 38, 96), torch.randn(3, 96)
    found = torch.empty(3, 38)
    given = [x, *constants(matrix)]
    run(
        linear,
        format,
        6,
        this_cpu(),
        None,
        given=given,
        results=[found],
        bias=None,
        exact=True,
    )
    assert apart(found, x @ matrix.dequantize().T) < 2e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_table(bits: int, symmetric: bool) -> None:
    format = Format(bits, 32, symmetric, "float16")
    table, ids = packed(format, 38, 96), torch.tensor([0, 31, 32, 37, 5], dtype=torch.int32)
    found = torch.empty(5, 96)
    matrix = Matrix(format, 38, 96, 3, 6)
    run(embedding_nbits, matrix, None, given=[ids, *constants(table)], results=[found])
    assert torch.equal(found, table.dequantize()[ids.long()])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("taps", [3, 7])
def test_a_short_convolution_carries_its_state(tokens: int, taps: int) -> None:
    weight, bias = torch.randn(32, 1, taps), torch.randn(32)
    own, state = torch.zeros(taps - 1, 32), torch.zeros(1, 32, taps - 1)
    length = 1 if tokens == 1 else None
    for _ in range(3):
        x, y = torch.randn(1, tokens, 96), torch.empty(tokens, 32)
        given = [x[0], weight[:, 0].T, bias, own]
        args = (32, taps, "float32", length)
        own_now = own.clone()
        given[-1] = own_now
        run(gated_short_conv, *args, given=given, results=[y], bias="float32")
        own = own_now
        expected, state = _REFERENCES["gated_short_conv"](x, weight, bias, state)
        assert apart(y, expected[0]) < 1e-6
        assert torch.equal(own, state[0].T)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("window", [0, 8])
def test_attention_over_a_cache(tokens: int, window: int) -> None:
    heads = attention.Heads(4, 2, 32, 48)
    length = 1 if tokens == 1 else None
    norms = [torch.rand(32) + 0.5 for _ in range(2)]
    steps = 1e4 ** -(torch.arange(16) / 16.0)
    keys, values = torch.zeros(1, 2, 48, 32), torch.zeros(1, 2, 48, 32)
    own = torch.zeros(heads.keys_shape), torch.zeros(heads.values_shape)
    parts = tuple(Columns(256, start, size) for start, size in ((0, 128), (128, 64), (192, 64)))
    for first in range(0, 42, tokens):
        qkv, start = torch.randn(1, tokens, 256), torch.tensor([first], dtype=torch.int32)
        cos, sin, turned, y = (torch.empty(tokens, n) for n in (32, 32, 128, 128))
        run(attention.angles, 32, length, given=[start, steps], results=[cos, sin])
        args = (heads, parts, ("float32",) * 2, 1e-5, length)
        given = [qkv[0]] * 3 + [start, *norms, cos, sin]
        run(attention.write_heads, *args, given=given, results=[*own, turned])
        given = [turned, start, *own]
        run(attention.attend, heads, window, length, given=given, results=[y])
        q, k, v = qkv.split([128, 64, 64], -1)
        positions = torch.arange(first, first + tokens)
        args = (q, k, v, *norms, steps, positions, keys, values, 1e-5, window, "scatter")
        expected, keys, values = _REFERENCES["attention"](*args)
        assert apart(y, expected.flatten(2)[0]) < 2e-6


def test_places_are_sorted_by_expert() -> None:
    scores, choice = torch.rand(7, 5), torch.rand(7, 5)
    chosen, shares = torch.empty(7, 2, dtype=torch.int32), torch.empty(7, 2)
    args = (5, 2, True, 2.5, None)
    run(routing.route, *args, given=[scores, choice], results=[chosen, shares])
    best = torch.topk(choice, 2).indices
    assert torch.equal(chosen.long(), best)
    picked = scores.gather(1, best)
    assert torch.allclose(shares, 2.5 * picked / (picked.sum(1, keepdim=True) + 1e-6))
    order, begins = torch.empty(14, dtype=torch.int32), torch.empty(6, dtype=torch.int32)
    run(routing.group, 5, 2, None, given=[chosen], results=[order, begins])
    assert torch.equal(order.sort().values, torch.arange(14, dtype=torch.int32))
    assert np.array_equal(begins, [0, *torch.bincount(best.flatten(), minlength=5).cumsum(0)])
    owners = chosen.flatten()[order.long()]
    assert torch.equal(owners, owners.sort().values)
