"""Static rounding, and constants as they lie in a file."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfmc.calib_free.grid.packed_tensor import pack_bits
from lfmc.targets.npu.static_ranges import Ranges, Step, step_of

FLOATS = st.floats(-1e4, 1e4, width=32)


@given(FLOATS, FLOATS, st.sampled_from([8, 16]))
@example(0.0, 4.9e-43, 16)  # a step of it is no float32
@example(0.0, 3.1e-39, 16)  # a step of it has few digits
@settings(max_examples=100, deadline=None)
def test_a_range_is_covered_and_zero_is_exact(one: float, other: float, bits: int) -> None:
    low, high = sorted((one, other))
    step = step_of(low, high, bits)
    assert float(step.rounded(torch.zeros(1))) == 0.0
    values = torch.linspace(low, high, 50)
    found = step.rounded(values)
    assert float((found - values).abs().max()) <= 1.01 * step.scale + 1e-6 * abs(high - low)
    assert torch.equal(step.rounded(found), found)  # a second rounding changes nothing


def test_what_is_outside_is_cut_off() -> None:
    step = step_of(-1.0, 3.0, 8)
    codes = step.codes(torch.tensor([-50.0, 50.0]))
    assert codes.tolist() == [0.0, 255.0]


def test_ranges_grow_and_a_sigmoid_has_its_own() -> None:
    ranges = Ranges()
    for value in (torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 1.0])):
        assert ranges.keep(value, "x") is value
    ranges.keep(torch.tensor([0.4, 0.6]), "gate.sigmoid")
    steps = ranges.steps(16)
    assert steps["x"] == step_of(-1.0, 2.0, 16)
    assert steps["gate.sigmoid"] == Step(1 / 65536, 0, 16)


def test_codes_of_4_bits_lie_as_onnx_has_them() -> None:
    """Two's complement, the lower half of a byte first."""
    signed = torch.tensor([-8, 7, -1, 1], dtype=torch.int16)
    packed = pack_bits((signed & 15).to(torch.uint8)[None], 4)[0]
    assert packed.tolist() == [0x78, 0x1F]
