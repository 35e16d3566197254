"""Kernels one by one, against the definitions of the operators in torch."""

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
from lfmc.targets.shared.rounded_operators import round_groups
from lfmc.targets.tvm.compile import tvm_target
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
            not machine_flags().issuperset(cpu.flags), reason=f"run it on a CPU with {cpu.name}"
        ),
        id=cpu.name,
    )
    for cpu in CPUS.values()
]


def run(
    builder: Callable[..., Any],
    *args: Any,
    inputs: Sequence[Tensor],
    cpu: Cpu | None = None,
    results: Sequence[Tensor],
    **options: Any,
) -> None:
    """Build a kernel and call it; the kernel writes `results`."""
    option_items = tuple(sorted(options.items()))
    buffers = [tvm.runtime.from_dlpack(tensor.contiguous()) for tensor in inputs]
    _compile(builder, args, option_items, cpu or this_cpu())(
        *buffers, *(tvm.runtime.from_dlpack(tensor) for tensor in results)
    )


@lru_cache
def _compile(builder: Any, args: Any, options: Any, cpu: Cpu) -> Any:
    function = builder(*args, **dict(options)).with_attr("global_symbol", "kernel")
    return tvm.compile(tvm.IRModule({"kernel": function}), tvm_target(cpu))["kernel"]


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
    tensors = [pack_codes(matrix.codes, bits).view(torch.uint32), pack_groups(matrix.scales)]
    if matrix.zeros is not None:
        tensors.append(pack_zeros(matrix.zeros, bits))
    return [value.unsqueeze(0) for value in tensors]


def round_activations(x: Tensor, group: int) -> list[Tensor]:
    """Return the activations of a product, rounded by the kernel."""
    count, size = x.shape
    groups = size // group
    results = [
        torch.empty(count, size // 4, dtype=torch.int32),
        torch.empty(count, groups),
        torch.empty(count, groups, dtype=torch.int32),
    ]
    run(round_rows, size, group, None, inputs=[x], results=results)
    return results


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_activations_are_rounded_like_the_reference(group: int) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 256)
    x[2] = 0
    words, steps, sums = round_activations(x, group)
    codes = words.view(torch.int8).float()
    dequantized = (codes.view(5, -1, group) * steps.unsqueeze(-1)).flatten(1)
    assert torch.equal(dequantized, round_groups(x, group))
    assert torch.equal(sums, codes.view(5, -1, group).sum(-1).int())
    assert not codes[2].any()
    assert int(codes.abs().max()) == 127


@pytest.mark.parametrize("cpu", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_every_width_and_cpu_family(cpu: Cpu, bits: int, symmetric: bool) -> None:
    """Rows that do not fill a block, tokens that do not fill a tile, a bias, the largest codes."""
    format = Format(bits, 32 if symmetric else 64, symmetric, "float16")
    matrix, bias = packed(format, 38, 128), torch.randn(38)
    matrix.codes[0] = (1 << bits) - 1
    x = torch.randn(cpu.tile + 3, 128, generator=torch.Generator().manual_seed(2))
    x[0] = 1.0  # all codes 127
    expected = round_groups(x, format.group) @ matrix.dequantize().T + bias
    actual = torch.empty(len(x), 38)
    args = (format, 6, cpu, None)
    inputs = [*round_activations(x, format.group), *constants(matrix), bias]
    run(linear, *args, inputs=inputs, cpu=cpu, results=[actual], bias="float32", exact=False)
    assert relative_error(actual, expected) < 1e-6
    single = torch.empty(1, 38)
    inputs = [*round_activations(x[:1], format.group), *constants(matrix), bias]
    run(
        linear,
        format,
        6,
        cpu,
        1,
        inputs=inputs,
        cpu=cpu,
        results=[single],
        bias="float32",
        exact=False,
    )
    assert relative_error(single, expected[:1]) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_with_float_activations(bits: int, symmetric: bool) -> None:
    format = Format(bits, 32, symmetric, "float16")
    matrix, x = packed(format, 38, 96), torch.randn(3, 96)
    actual = torch.empty(3, 38)
    inputs = [x, *constants(matrix)]
    run(
        linear,
        format,
        6,
        this_cpu(),
        None,
        inputs=inputs,
        results=[actual],
        bias=None,
        exact=True,
    )
    assert relative_error(actual, x @ matrix.dequantize().T) < 2e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding_rows_are_dequantized(bits: int, symmetric: bool) -> None:
    format = Format(bits, 32, symmetric, "float16")
    table, ids = packed(format, 38, 96), torch.tensor([0, 31, 32, 37, 5], dtype=torch.int32)
    actual = torch.empty(5, 96)
    matrix = Matrix(format, 38, 96, 3, 6)
    run(embedding_nbits, matrix, None, inputs=[ids, *constants(table)], results=[actual])
    assert torch.equal(actual, table.dequantize()[ids.long()])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("taps", [3, 7])
def test_a_short_convolution_carries_its_state(tokens: int, taps: int) -> None:
    weight, bias = torch.randn(32, 1, taps), torch.randn(32)
    actual_state, expected_state = torch.zeros(taps - 1, 32), torch.zeros(1, 32, taps - 1)
    length = 1 if tokens == 1 else None
    for _ in range(3):
        x, y = torch.randn(1, tokens, 96), torch.empty(tokens, 32)
        inputs = [x[0], weight[:, 0].T, bias, actual_state]
        args = (32, taps, "float32", length)
        next_state = actual_state.clone()
        inputs[-1] = next_state
        run(gated_short_conv, *args, inputs=inputs, results=[y], bias="float32")
        actual_state = next_state
        expected, expected_state = _REFERENCES["gated_short_conv"](x, weight, bias, expected_state)
        assert relative_error(y, expected[0]) < 1e-6
        assert torch.equal(actual_state, expected_state[0].T)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("window", [0, 8])
def test_attention_over_a_cache(tokens: int, window: int) -> None:
    heads = attention.Heads(4, 2, 32, 48)
    length = 1 if tokens == 1 else None
    norms = [torch.rand(32) + 0.5 for _ in range(2)]
    steps = 1e4 ** -(torch.arange(16) / 16.0)
    keys, values = torch.zeros(1, 2, 48, 32), torch.zeros(1, 2, 48, 32)
    caches = torch.zeros(heads.keys_shape), torch.zeros(heads.values_shape)
    parts = tuple(Columns(256, start, size) for start, size in ((0, 128), (128, 64), (192, 64)))
    for first in range(0, 42, tokens):
        qkv, start = torch.randn(1, tokens, 256), torch.tensor([first], dtype=torch.int32)
        cos, sin, rotated, y = (torch.empty(tokens, size) for size in (32, 32, 128, 128))
        run(attention.angles, 32, length, inputs=[start, steps], results=[cos, sin])
        args = (heads, parts, ("float32",) * 2, 1e-5, length)
        inputs = [qkv[0]] * 3 + [start, *norms, cos, sin]
        run(attention.write_heads, *args, inputs=inputs, results=[*caches, rotated])
        inputs = [rotated, start, *caches]
        run(attention.attend, heads, window, length, inputs=inputs, results=[y])
        q, k, v = qkv.split([128, 64, 64], -1)
        positions = torch.arange(first, first + tokens)
        args = (q, k, v, *norms, steps, positions, keys, values, 1e-5, window, "scatter")
        expected, keys, values = _REFERENCES["attention"](*args)
        assert relative_error(y, expected.flatten(2)[0]) < 2e-6


def test_places_are_sorted_by_expert() -> None:
    scores, choice = torch.rand(7, 5), torch.rand(7, 5)
    expert_ids, shares = torch.empty(7, 2, dtype=torch.int32), torch.empty(7, 2)
    args = (5, 2, True, 2.5, None)
    run(routing.route, *args, inputs=[scores, choice], results=[expert_ids, shares])
    experts = torch.topk(choice, 2).indices
    assert torch.equal(expert_ids.long(), experts)
    selected = scores.gather(1, experts)
    assert torch.allclose(shares, 2.5 * selected / (selected.sum(1, keepdim=True) + 1e-6))
    order, begins = torch.empty(14, dtype=torch.int32), torch.empty(6, dtype=torch.int32)
    run(routing.group, 5, 2, None, inputs=[expert_ids], results=[order, begins])
    assert torch.equal(order.sort().values, torch.arange(14, dtype=torch.int32))
    assert np.array_equal(begins, [0, *torch.bincount(experts.flatten(), minlength=5).cumsum(0)])
    owners = expert_ids.flatten()[order.long()]
    assert torch.equal(owners, owners.sort().values)
