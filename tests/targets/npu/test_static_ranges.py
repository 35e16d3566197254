"""Static quantization steps, and the layout of constants in a file."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfmc.calib_free.grid.packed_tensor import pack_bits
from lfmc.targets.npu.static_ranges import Ranges, Step, step_of_range

FLOATS = st.floats(-1e4, 1e4, width=32)


@given(FLOATS, FLOATS, st.sampled_from([8, 16]))
@example(0.0, 4.9e-43, 16)  # a step of this range is no float32
@example(0.0, 3.1e-39, 16)  # a step of this range is a denormal float32 with few digits
@settings(max_examples=100, deadline=None)
def test_a_range_is_covered_and_zero_is_exact(first: float, second: float, bits: int) -> None:
    low, high = sorted((first, second))
    step = step_of_range(low, high, bits)
    assert float(step.round(torch.zeros(1))) == 0.0
    values = torch.linspace(low, high, 50)
    rounded = step.round(values)
    assert float((rounded - values).abs().max()) <= 1.01 * step.scale + 1e-6 * abs(high - low)
    assert torch.equal(step.round(rounded), rounded)  # a second rounding changes nothing


def test_values_outside_of_the_range_are_clipped() -> None:
    step = step_of_range(-1.0, 3.0, 8)
    codes = step.codes(torch.tensor([-50.0, 50.0]))
    assert codes.tolist() == [0.0, 255.0]


def test_ranges_grow_and_a_sigmoid_has_a_fixed_range() -> None:
    ranges = Ranges()
    for value in (torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 1.0])):
        assert ranges.observe(value, "x") is value
    ranges.observe(torch.tensor([0.4, 0.6]), "gate.sigmoid")
    steps = ranges.steps(16)
    assert steps["x"] == step_of_range(-1.0, 2.0, 16)
    assert steps["gate.sigmoid"] == Step(1 / 65536, 0, 16)


def test_4_bit_codes_have_the_layout_of_onnx() -> None:
    """ONNX stores two's complement, with the first code in the lower half of a byte."""
    signed = torch.tensor([-8, 7, -1, 1], dtype=torch.int16)
    packed = pack_bits((signed & 15).to(torch.uint8)[None], 4)[0]
    assert packed.tolist() == [0x78, 0x1F]
