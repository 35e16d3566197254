"""Static rounding of activations: a range for every value of a graph, seen on text of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.errors import GateError
from lfmc.graph.program import Program
from lfmc.targets.npu.forms import Forms, Given, Keep, Style
from lfmc.targets.npu.host import Embed, HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import BELOW, MASKED, SCALED, SIGMOID
from lfmc.targets.npu.run_program import run_program

OUT_OF_SIGHT = 12.0  # below the largest score: e^-12 is less than half a step of 16 bits


@dataclass(frozen=True)
class Step:
    """A value is `(code - zero) * scale`, codes from 0 to `2^bits - 1`; `signed` tells that they
    are held with a sign and no zero point: less `zero`, which is in their middle."""

    scale: float
    zero: int
    bits: int
    signed: bool = False

    def codes(self, value: Tensor) -> Tensor:
        """Float32 codes, half to even, cut off at both ends."""
        scale = torch.tensor(self.scale, dtype=torch.float32)
        return (torch.round(value / scale) + self.zero).clamp(0, (1 << self.bits) - 1)

    def rounded(self, value: Tensor) -> Tensor:
        scale = torch.tensor(self.scale, dtype=torch.float32)
        return (self.codes(value) - self.zero) * scale


def step_of(low: float, high: float, bits: int) -> Step:
    """The step of a range, widened so that 0 is a code; never finer than a normal float32."""
    low, high, last = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    if low == high:
        return Step(1.0, 0, bits)
    width = max((high - low) / last, torch.finfo(torch.float32).tiny)
    scale = float(torch.tensor(width, dtype=torch.float32))
    return Step(scale, min(last, max(0, round(-low / scale))), bits)


def balanced_step(low: float, high: float, bits: int) -> Step:
    """The same with signed codes."""
    middle = 1 << (bits - 1)
    ends = step_of(0.0, max(-low, high) * ((1 << bits) - 1) / (middle - 1), bits)
    return Step(ends.scale, middle, bits, signed=True)


def none(name: str) -> bool:
    return False


def every(name: str) -> bool:
    return True


class Ranges:
    """Sees values go by, and remembers how far they reach."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def keep(self, value: Tensor, name: str) -> Tensor:
        low, high = (float(end) for end in value.aminmax())
        seen = self.found.get(name, (low, high))
        self.found[name] = (min(low, seen[0]), max(high, seen[1]))
        return value

    def steps(self, bits: int, balanced: Callable[[str], bool] = none) -> dict[str, Step]:
        """Steps of values by name; `balanced` tells which of them have signed codes."""

        def step(name: str, low: float, high: float) -> Step:
            if balanced(name):
                return balanced_step(low, high, bits)
            if name.endswith(SIGMOID):
                return Step(1 / (1 << bits), 0, bits)
            return step_of(low, high, bits)

        return {name: step(name, *self._ends(name)) for name in self.found}

    def _ends(self, name: str) -> tuple[float, float]:
        """How far a step has to reach: not to what is masked, whose share is zero anyway."""
        if name.endswith(MASKED):
            low, high = self.found[name.removesuffix(MASKED) + SCALED]
            return low - OUT_OF_SIGHT, high
        return (-OUT_OF_SIGHT, 0.0) if name.endswith(BELOW) else self.found[name]


def observe(
    program: Program,
    interface: Interface,
    given: Given,
    embed: Embed,
    texts: Iterable[Tensor],
    style: Style,
) -> Ranges:
    """Ranges of all values while texts, int64 `[T]` each, go through in calls of `interface`."""
    ranges = Ranges()
    lengths = [interface.tokens]
    stepper = torch_stepper(program, interface, lengths, given, embed, ranges.keep, style)
    for text in texts:
        stepper.reset()
        stepper.step(text)
    return ranges


def torch_stepper(
    program: Program,
    interface: Interface,
    lengths: Sequence[int],
    given: Given,
    embed: Embed,
    keep: Keep,
    style: Style,
) -> HostStepper:
    """The host's calls, with the graphs in torch."""

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            own = interface.of_tokens(count)
            return run_program(Forms(program, own, given, keep, style), inputs)

    return HostStepper(interface, lengths, execute, embed)


def rounding(steps: Mapping[str, Step]) -> Keep:
    """Rounds every value by its step; `GateError` for one that has none."""

    def keep(value: Tensor, name: str) -> Tensor:
        if name not in steps:
            raise GateError("the artifact has no step for a value of the model", where=name)
        return steps[name].rounded(value)

    return keep
