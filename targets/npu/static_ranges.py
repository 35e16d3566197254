"""Static quantization of activations, with value ranges observed on text that the model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.errors import GateError
from lfmc.graph.program import Program
from lfmc.targets.npu.forms import Forms, ReadConstant, RoundValue, Style
from lfmc.targets.npu.host import Embed, HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import BELOW, MASKED, SCALED, SIGMOID
from lfmc.targets.npu.run_program import run_program

# Scores are clipped this far below the largest: e^-12 is less than half a step of 16 bits.
SCORE_RANGE = 12.0


@dataclass(frozen=True)
class Step:
    """A value is `(code - zero) * scale`, with codes from 0 to `2^bits - 1`.

    `signed` codes are stored with a sign and without a zero point: `zero`, the middle code, is
    subtracted from them.
    """

    scale: float
    zero: int
    bits: int
    signed: bool = False

    def codes(self, value: Tensor) -> Tensor:
        """Return float32 codes, rounded half to even and clipped at both ends."""
        scale = torch.tensor(self.scale, dtype=torch.float32)
        return (torch.round(value / scale) + self.zero).clamp(0, (1 << self.bits) - 1)

    def round(self, value: Tensor) -> Tensor:
        scale = torch.tensor(self.scale, dtype=torch.float32)
        return (self.codes(value) - self.zero) * scale


def step_of_range(low: float, high: float, bits: int) -> Step:
    """Return the step of a range, which is widened to include 0.

    The scale is at least the smallest normal float32.
    """
    low, high, last = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    if low == high:
        return Step(1.0, 0, bits)
    width = max((high - low) / last, torch.finfo(torch.float32).tiny)
    scale = float(torch.tensor(width, dtype=torch.float32))
    return Step(scale, min(last, max(0, round(-low / scale))), bits)


def symmetric_step(low: float, high: float, bits: int) -> Step:
    """Return the step of a range with signed codes, symmetric around 0."""
    middle = 1 << (bits - 1)
    full = step_of_range(0.0, max(-low, high) * ((1 << bits) - 1) / (middle - 1), bits)
    return Step(full.scale, middle, bits, signed=True)


def no_values(name: str) -> bool:
    return False


def all_values(name: str) -> bool:
    return True


class Ranges:
    """Record the smallest and the largest number of each value."""

    def __init__(self) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}

    def observe(self, value: Tensor, name: str) -> Tensor:
        low, high = (float(end) for end in value.aminmax())
        earlier = self.ranges.get(name, (low, high))
        self.ranges[name] = (min(low, earlier[0]), max(high, earlier[1]))
        return value

    def steps(self, bits: int, is_symmetric: Callable[[str], bool] = no_values) -> dict[str, Step]:
        """Return steps by value name; `is_symmetric` selects the values with signed codes."""

        def step(name: str, low: float, high: float) -> Step:
            if is_symmetric(name):
                return symmetric_step(low, high, bits)
            if name.endswith(SIGMOID):
                return Step(1 / (1 << bits), 0, bits)
            return step_of_range(low, high, bits)

        return {name: step(name, *self._clipped_range(name)) for name in self.ranges}

    def _clipped_range(self, name: str) -> tuple[float, float]:
        """Return the range of a value, without masked scores: their softmax is 0 in any case."""
        if name.endswith(MASKED):
            low, high = self.ranges[name.removesuffix(MASKED) + SCALED]
            return low - SCORE_RANGE, high
        return (-SCORE_RANGE, 0.0) if name.endswith(BELOW) else self.ranges[name]


def observe_ranges(
    program: Program,
    interface: Interface,
    read_constant: ReadConstant,
    embed: Embed,
    texts: Iterable[Tensor],
    style: Style,
) -> Ranges:
    """Return the ranges of all values on texts, int64 `[T]` each, in calls of `interface`."""
    ranges = Ranges()
    lengths = [interface.tokens]
    stepper = torch_stepper(
        program, interface, lengths, read_constant, embed, ranges.observe, style
    )
    for text in texts:
        stepper.reset()
        stepper.step(text)
    return ranges


def torch_stepper(
    program: Program,
    interface: Interface,
    lengths: Sequence[int],
    read_constant: ReadConstant,
    embed: Embed,
    round_value: RoundValue,
    style: Style,
) -> HostStepper:
    """Return a stepper that makes the host's calls, with the graphs in torch."""

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            call_interface = interface.with_tokens(count)
            forms = Forms(program, call_interface, read_constant, round_value, style)
            return run_program(forms, inputs)

    return HostStepper(interface, lengths, execute, embed)


def round_to_steps(steps: Mapping[str, Step]) -> RoundValue:
    """Return a function that rounds every value to its step.

    The function raises `GateError` for a value without a step.
    """

    def round_value(value: Tensor, name: str) -> Tensor:
        if name not in steps:
            raise GateError("the artifact has no step for a value of the model", where=name)
        return steps[name].round(value)

    return round_value
