from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.calib_free.fit.fake_quant import FakeQuant, straight_through
from lfmc.calib_free.grid.formats import ROW, Format
from lfmc.calib_free.grid.grid_search import quantize

FORMATS = [
    Format(bits, group, symmetric, dtype)
    for bits, group in ((2, 32), (3, 16), (4, 32), (8, 64), (8, ROW))
    for symmetric in (True, False)
    for dtype in ("float16", "bfloat16", "float32")
]


def weight(rows: int = 5, columns: int = 72, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.1


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("grid", ["clip", "signed"])
def test_the_initial_codes_are_those_of_the_packed_tensor(number_format: Format, grid: str) -> None:
    packed = quantize(weight(), number_format, None, grid)
    repacked = FakeQuant(weight(), packed).packed()
    assert torch.equal(repacked.codes, packed.codes)
    assert torch.equal(repacked.scales, packed.scales)
    assert (repacked.zeros is None) == (packed.zeros is None)
    assert packed.zeros is None or torch.equal(repacked.zeros, packed.zeros)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FORMATS), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
def test_forward_returns_the_stored_weight(
    number_format: Format, rows: int, columns: int, seed: int
) -> None:
    module = FakeQuant(
        weight(rows, columns, seed),
        quantize(weight(rows, columns, seed), number_format, None, "clip"),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, size in ((module.latent, 1.0), (module.log_scale, 0.3), (module.zero, 1.0)):
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
        output = module()
    packed = module.packed()
    assert packed.scales.dtype == getattr(torch, number_format.scale_dtype)
    assert torch.equal(packed.dequantize(), output)


def test_gradients_of_weights_scales_and_zeros() -> None:
    # One group of four: codes 0 to 3, zero point 1, scale 0.5; the last weight is beyond the grid.
    number_format = Format(2, 4, False, "float32")
    x = torch.tensor([[-0.5, 0.1, 0.7, 1.9]])
    packed = quantize(torch.tensor([[-0.5, 0.0, 0.5, 1.0]]), number_format, None, "minmax")
    assert (float(packed.scales), int(packed.zeros)) == (0.5, 1)  # type: ignore[arg-type]
    module = FakeQuant(x, packed)
    assert module().tolist() == [[-0.5, 0.0, 0.5, 1.0]]
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    (module() * upstream).sum().backward()
    # A weight in steps of 0.5 moves the result by 0.5 a step, unless it is clamped.
    assert module.latent.grad is not None
    assert module.latent.grad.flatten().tolist() == [0.5, 5.0, 50.0, 0.0]
    # A clamped code scales with the scale; an unclamped one by its rounding error in steps.
    assert module.log_scale.grad is not None
    expected = 0.5 * (0.0 * 1 + (0.0 - 0.2) * 10 + (1.0 - 1.4) * 100 + 2.0 * 1000)
    assert float(module.log_scale.grad) == pytest.approx(expected)
    # The zero point shifts a clamped weight alone.
    assert module.zero.grad is not None
    assert float(module.zero.grad) == pytest.approx(-0.5 * 1000)


def test_a_symmetric_format_trains_no_zero_point() -> None:
    module = FakeQuant(weight(), quantize(weight(), Format(4, 32, True, "float16"), None, "clip"))
    module().sum().backward()
    assert not module.zero.requires_grad
    assert module.zero.grad is None
    assert module.packed().zeros is None


def test_training_starts_from_codes_that_are_not_the_nearest() -> None:
    number_format = Format(4, 32, False, "float16")
    packed = quantize(weight(), number_format, None, "clip")
    generator = torch.Generator().manual_seed(1)
    shift = torch.randint(-2, 3, packed.codes.shape, generator=generator)
    codes = (packed.codes.int() + shift).clamp(0, 15).to(torch.uint8)
    fitted = replace(packed, codes=codes)
    module = FakeQuant(weight(), fitted)
    assert torch.equal(module.packed().codes, codes)
    assert torch.equal(module().detach(), fitted.dequantize())


def test_straight_through_is_exact_and_passes_gradients() -> None:
    value = torch.tensor([0.1, 1e8], requires_grad=True)
    result = straight_through(value, torch.tensor([1e-9, 3.0]))
    assert result.tolist() == torch.tensor([1e-9, 3.0]).tolist()
    (result * torch.tensor([2.0, 5.0])).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [2.0, 5.0]
