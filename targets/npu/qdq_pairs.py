"""The program as a graph of quantize and dequantize pairs, which ExecuTorch's backends take.

Every value that is kept has a pair, and so has what only moves one (a view, a slice). Matrices are
`[N, K]`, as linear layers have them; constants are the module's own parameters, read from a file as
`lfmc.targets.npu.constants` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import export

from lfmc.graph.program import Program
from lfmc.targets.npu.constants import matrix_bits, read_matrix
from lfmc.targets.npu.forms import Forms, Keep, Style
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX
from lfmc.targets.npu.run_program import run_program
from lfmc.targets.npu.static_ranges import Step, balanced_step
from lfmc.targets.shared.parameters_file import Parameters
from lfmc.targets.shared.plain_torch import Held

_OPS = torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = _OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default
DEQUANTIZE_ROWS = _OPS.dequantize_per_channel.default
MOVING = {
    *("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand"),
    *("slice", "select", "chunk", "split", "cat", "topk", "amax", "amin", "where"),
}


@dataclass(frozen=True)
class Coding:
    """How a backend has codes of values: their dtype, by bits, and whether the lowest of them is
    0 or the lowest number with a sign."""

    dtypes: Mapping[int, torch.dtype]
    signed: bool

    def lowest(self, step: Step) -> int:
        return -(1 << (step.bits - 1)) if self.signed else 0

    def arguments(self, step: Step) -> tuple[Any, ...]:
        """Of the operators: scale, zero point, lowest and highest code, dtype."""
        low, last = self.lowest(step), (1 << step.bits) - 1
        return step.scale, step.zero + low, low, low + last, self.dtypes[step.bits]

    def step(self, scale: float, zero: int, low: int, high: int, dtype: torch.dtype) -> Step:
        """The inverse of `arguments`."""
        return Step(scale, zero - low, (high - low).bit_length())

    def codes(self, value: Tensor, step: Step) -> Tensor:
        return (step.codes(value) + self.lowest(step)).to(self.dtypes[step.bits])

    def values(self, codes: Tensor, step: Step) -> Tensor:
        """Float32 numbers of codes."""
        scale, zero, *_ = self.arguments(step)
        middle: Tensor = codes.float() - zero
        return middle * torch.tensor(scale, dtype=torch.float32)

    def pair(self, value: Tensor, step: Step) -> Tensor:
        arguments = self.arguments(step)
        rounded: Tensor = DEQUANTIZE(QUANTIZE(value, *arguments), *arguments)
        return rounded


class Constants(nn.Module):
    """Constants as parameters, made once each."""

    def __init__(self, held: Parameters) -> None:
        super().__init__()
        self._held = held
        self._names: dict[Any, tuple[str, ...]] = {}

    def given(self, sources: tuple[str, ...]) -> Tensor:
        """A tensor of the file, matrices `[N, K]`."""
        (name,) = sources
        bits = matrix_bits(self._held, name)
        if not bits:
            return self._made(name, lambda: (self._read(name).float(),))[0]

        def make() -> tuple[Tensor, ...]:
            codes, scales = read_matrix(self._held, name)
            return codes, scales, torch.zeros(len(scales), dtype=torch.int64)

        half = 1 << (bits - 1)
        range_of_codes = (0, -half, half - 1, torch.int8)  # on dim 0
        made: Tensor = DEQUANTIZE_ROWS(*self._made(name, make), *range_of_codes)
        return made

    def _read(self, name: str) -> Tensor:
        value = self._held.tensor(name)
        return value.T if value.ndim == 2 else value

    def rounded(self, key: str | float, step: Step, coding: Coding) -> Tensor:
        """A tensor of the file or a number, rounded like a value."""

        def make() -> tuple[Tensor]:
            value = torch.full((1,), key) if isinstance(key, float) else self._read(key)
            return (coding.codes(value.float(), step),)

        (codes,) = self._made((key, step), make)
        made: Tensor = DEQUANTIZE(codes, *coding.arguments(step))
        return made

    def _made(self, key: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if key not in self._names:
            first, made = sum(map(len, self._names.values())), make()
            self._names[key] = tuple(f"c{first + index}" for index in range(len(made)))
            for name, value in zip(self._names[key], made, strict=True):
                own = nn.Parameter(value.contiguous(), requires_grad=False)
                self.register_parameter(name, own)
        return tuple(map(self.get_parameter, self._names[key]))


class PairedForms(Forms):
    """`steps` and `coding` are of every value that is kept; floats stay such where there are no
    steps. `keep` is told of every value behind its pair."""

    def __init__(
        self,
        program: Program,
        interface: Interface,
        constants: Constants,
        steps: Mapping[str, Step],
        coding: Coding,
        keep: Keep,
        style: Style,
        *,
        coded: bool,
    ) -> None:
        self.constants, self.steps, self.coding = constants, steps, coding
        self.coded, self._told = coded, keep

        def paired(value: Tensor, name: str) -> Tensor:
            return keep(coding.pair(value, steps[name]) if steps else value, name)

        super().__init__(program, interface, constants.given, paired, style)

    def taken(self, value: Tensor, name: str) -> Tensor:
        if not self.coded:
            return super().taken(value, name)
        return self._told(DEQUANTIZE(value, *self.coding.arguments(self.steps[name])), name)

    def multiplied(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def product(self, x: Tensor, weight: Held, part: str = "") -> Tensor:
        if weight.part != "values" or not self.style.by_parts:
            return super().product(x, weight, part)
        # A layer has no 16-bit weights; a product of two values has.
        matrix = self.matrix(weight).transpose(0, 1).unsqueeze(0)
        made = self.keep(torch.bmm(x.reshape(1, -1, x.shape[-1]), matrix), part)
        return made.view(*x.shape[:-1], -1)

    def matrix(self, weight: Held) -> Tensor:
        if not self.steps or weight.part != "values":
            return super().matrix(weight)
        (name,) = weight.sources
        return self.constants.rounded(name, self.steps[name + MATRIX], self.coding)

    def small(self, held: Held) -> Tensor:
        if not self.steps:
            return super().small(held)
        (name,) = held.sources
        return self.constants.rounded(name, self.steps[name], self.coding)

    def number(self, value: float) -> float | Tensor:
        if not self.steps:
            return value
        return self.constants.rounded(value, balanced_step(0.0, value, self._bits), self.coding)

    @property
    def _bits(self) -> int:
        return next(iter(self.steps.values())).bits

    def zero(self, part: str) -> float | Tensor:
        if not self.steps:
            return 0.0
        return self.constants.rounded(0.0, self.steps[f"{self._name}.{part}"], self.coding)


class _Paired(nn.Module):
    def __init__(self, constants: Constants, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.constants, self._run = constants, run

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._run(*values)


@dataclass(frozen=True)
class Pairs:
    """`module` takes an interface's inputs, like `example`, and gives its outputs; then, where they
    were asked for, the values that it keeps. `kept` are the names of those, constants left out.
    Outputs that are codes have `steps`."""

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    kept: tuple[str, ...]
    steps: tuple[Step, ...] = ()


def paired(
    program: Program,
    interface: Interface,
    steps: Mapping[str, Step],
    held: Parameters,
    coding: Coding,
    style: Style,
    *,
    probed: bool = False,
    coded: bool = False,
) -> Pairs:
    """The graph for calls of `interface`, with the constants of a file. `coded` inputs and outputs
    are codes."""
    constants = Constants(held)
    kept: list[tuple[str, Tensor]] = []

    def keep(value: Tensor, name: str) -> Tensor:
        kept.append((name, value))
        return value

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        kept.clear()
        forms = PairedForms(program, interface, constants, steps, coding, keep, style, coded=coded)
        made = run_program(forms, dict(zip(interface.inputs, values, strict=True)))
        return (*made.values(), *(value for _, value in kept if probed))

    example = tuple(
        torch.zeros(shape, dtype=coding.dtypes[steps[name].bits] if coded else torch.float32)
        for name, shape in interface.inputs.items()
    )
    with torch.no_grad():
        run(*example)  # makes the parameters
        exported = export(_Paired(constants, run), example, strict=False)
    module = exported.module()
    _complete(module.graph)
    own = _give_codes(module.graph, coding) if coded else ()
    module.recompile()
    return Pairs(module, example, tuple(name for name, _ in kept), own)


def _complete(graph: fx.Graph) -> None:
    """Give what operators move the step of what they move."""
    steps: dict[fx.Node, Sequence[Any]] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target == DEQUANTIZE:
            steps[node] = node.args[1:]
            continue
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        source: Any = node.args[-1 if name == "where" else 0]
        source = source[0] if isinstance(source, list | tuple) else source
        if source not in steps or name not in (*MOVING, "getitem"):
            continue
        steps[node] = steps[source]
        quantized = all(user.target == QUANTIZE for user in node.users)
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.is_floating_point() and not quantized:
            steps[_with_pair(graph, node, steps[node])] = steps[node]


def _give_codes(graph: fx.Graph, coding: Coding) -> tuple[Step, ...]:
    """Give outputs as they are before they are dequantized; their steps."""
    output = graph.output_node()
    values: Any = output.args[0]
    output.args = (tuple(value.args[0] for value in values),)
    graph.eliminate_dead_code()
    return tuple(coding.step(*value.args[1:]) for value in values)


def _with_pair(graph: fx.Graph, node: fx.Node, arguments: Sequence[Any]) -> fx.Node:
    with graph.inserting_after(node):
        codes = graph.call_function(QUANTIZE, (node, *arguments))
    with graph.inserting_after(codes):
        back = graph.call_function(DEQUANTIZE, (codes, *arguments))
    codes.meta["val"], back.meta["val"] = node.meta["val"].to(arguments[-1]), node.meta["val"]
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not codes)
    return back
