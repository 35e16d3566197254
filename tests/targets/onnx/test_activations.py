"""The torch model of ONNX Runtime's kernels (parity compares it with the kernels themselves)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.targets.onnx.activations import table_matmul
from lfmc.targets.shared.rounded_operators import round_groups


@given(st.integers(1, 5), st.integers(1, 100), st.sampled_from([16, 32, 64]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rounding_moves_no_value_by_more_than_half_a_step(
    rows: int, size: int, block: int, seed: int
) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    rounded = round_groups(x, block)
    assert rounded.shape == x.shape
    for start in range(0, size, block):
        values = x[:, start : start + block]
        half_step = values.abs().amax(-1, keepdim=True) / 127 / 2
        moved = (rounded[:, start : start + block] - values).abs()
        assert bool((moved <= half_step * 1.0001).all())


def test_zero_blocks_stay_zero() -> None:
    assert torch.equal(round_groups(torch.zeros(2, 48), 32), torch.zeros(2, 48))


def test_tables_agree_with_the_float_product() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 128, generator=generator)
    codes = torch.randint(4, (24, 128), generator=generator, dtype=torch.uint8)
    scales = torch.rand(24, 4, generator=generator) + 0.5
    zeros = torch.randint(4, (24, 4), generator=generator, dtype=torch.uint8)
    for points in (zeros, None):
        middle = 2.0 if points is None else points.float().unsqueeze(-1)
        weight = ((codes.view(24, 4, 32).float() - middle) * scales.unsqueeze(-1)).flatten(1)
        expected = x @ weight.T
        actual = table_matmul(x, codes, scales, points, 32)
        assert (actual - expected).abs().max() < 0.02 * expected.abs().max()
        assert not torch.equal(actual, expected)  # the tables are rounded
