"""The program as a graph of quantize and dequantize pairs, the input of ExecuTorch's backends.

Every rounded value has a pair, and so has the result of an operator that only moves values (a view,
a slice). Matrices are `[N, K]`, as in linear layers. Constants are parameters of the module, read
from a file that `lfmc.targets.npu.constants` wrote.
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
from lfmc.targets.npu.forms import Forms, RoundValue, Style
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX
from lfmc.targets.npu.run_program import run_program
from lfmc.targets.npu.static_ranges import Step, symmetric_step
from lfmc.targets.shared.parameters_file import Parameters
from lfmc.targets.shared.plain_torch import ConstantRef

_OPS = torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = _OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default
DEQUANTIZE_ROWS = _OPS.dequantize_per_channel.default
MOVING = {
    *("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand"),
    *("slice", "select", "chunk", "split", "cat", "topk", "amax", "amin", "where"),
}


@dataclass(frozen=True)
class Coding:
    """How a backend stores the codes of values: the dtype for each bit width, and the sign.

    The lowest code is 0, or the lowest signed number.
    """

    dtypes: Mapping[int, torch.dtype]
    signed: bool

    def lowest(self, step: Step) -> int:
        return -(1 << (step.bits - 1)) if self.signed else 0

    def arguments(self, step: Step) -> tuple[Any, ...]:
        """Return the operators' arguments: scale, zero point, lowest and highest code, dtype."""
        low, last = self.lowest(step), (1 << step.bits) - 1
        return step.scale, step.zero + low, low, low + last, self.dtypes[step.bits]

    def step(self, scale: float, zero: int, low: int, high: int, dtype: torch.dtype) -> Step:
        """Return the step of such arguments, the inverse of `arguments`."""
        return Step(scale, zero - low, (high - low).bit_length())

    def codes(self, value: Tensor, step: Step) -> Tensor:
        return (step.codes(value) + self.lowest(step)).to(self.dtypes[step.bits])

    def values(self, codes: Tensor, step: Step) -> Tensor:
        """Return the float32 numbers of codes."""
        scale, zero, *_ = self.arguments(step)
        centered: Tensor = codes.float() - zero
        return centered * torch.tensor(scale, dtype=torch.float32)

    def pair(self, value: Tensor, step: Step) -> Tensor:
        arguments = self.arguments(step)
        rounded: Tensor = DEQUANTIZE(QUANTIZE(value, *arguments), *arguments)
        return rounded


class Constants(nn.Module):
    """Constants as parameters, each created once."""

    def __init__(self, file: Parameters) -> None:
        super().__init__()
        self._file = file
        self._names: dict[Any, tuple[str, ...]] = {}

    def read_constant(self, sources: tuple[str, ...]) -> Tensor:
        """Return a tensor of the file; matrices are `[N, K]`."""
        (name,) = sources
        bits = matrix_bits(self._file, name)
        if not bits:
            return self._register(name, lambda: (self._read(name).float(),))[0]

        def make() -> tuple[Tensor, ...]:
            codes, scales = read_matrix(self._file, name)
            return codes, scales, torch.zeros(len(scales), dtype=torch.int64)

        half = 1 << (bits - 1)
        range_of_codes = (0, -half, half - 1, torch.int8)  # on dim 0
        matrix: Tensor = DEQUANTIZE_ROWS(*self._register(name, make), *range_of_codes)
        return matrix

    def _read(self, name: str) -> Tensor:
        value = self._file.tensor(name)
        return value.T if value.ndim == 2 else value

    def rounded(self, key: str | float, step: Step, coding: Coding) -> Tensor:
        """Return a tensor of the file or a number, rounded like a value."""

        def make() -> tuple[Tensor]:
            value = torch.full((1,), key) if isinstance(key, float) else self._read(key)
            return (coding.codes(value.float(), step),)

        (codes,) = self._register((key, step), make)
        value: Tensor = DEQUANTIZE(codes, *coding.arguments(step))
        return value

    def _register(self, key: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if key not in self._names:
            first, values = sum(map(len, self._names.values())), make()
            self._names[key] = tuple(f"c{first + index}" for index in range(len(values)))
            for name, value in zip(self._names[key], values, strict=True):
                parameter = nn.Parameter(value.contiguous(), requires_grad=False)
                self.register_parameter(name, parameter)
        return tuple(map(self.get_parameter, self._names[key]))


class QdqForms(Forms):
    """Forms that round every value by a pair, with its step and `coding`.

    Without steps, values stay float. `record` is called for every value behind its pair. With
    `coded`, the inputs of the graph are codes.
    """

    def __init__(
        self,
        program: Program,
        interface: Interface,
        constants: Constants,
        steps: Mapping[str, Step],
        coding: Coding,
        record: RoundValue,
        style: Style,
        *,
        coded: bool,
    ) -> None:
        self.constants, self.steps, self.coding = constants, steps, coding
        self.coded, self._record = coded, record

        def round_value(value: Tensor, name: str) -> Tensor:
            return record(coding.pair(value, steps[name]) if steps else value, name)

        super().__init__(program, interface, constants.read_constant, round_value, style)

    def round_input(self, value: Tensor, name: str) -> Tensor:
        if not self.coded:
            return super().round_input(value, name)
        return self._record(DEQUANTIZE(value, *self.coding.arguments(self.steps[name])), name)

    def matmul(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def linear(self, x: Tensor, weight: ConstantRef, part: str = "") -> Tensor:
        if weight.part != "values" or not self.style.by_parts:
            return super().linear(x, weight, part)
        # Linear layers support no 16-bit weights; products of two values do.
        matrix = self.load_matrix(weight).transpose(0, 1).unsqueeze(0)
        product = self.round(torch.bmm(x.reshape(1, -1, x.shape[-1]), matrix), part)
        return product.view(*x.shape[:-1], -1)

    def load_matrix(self, weight: ConstantRef) -> Tensor:
        if not self.steps or weight.part != "values":
            return super().load_matrix(weight)
        (name,) = weight.sources
        return self.constants.rounded(name, self.steps[name + MATRIX], self.coding)

    def load_constant(self, constant: ConstantRef) -> Tensor:
        if not self.steps:
            return super().load_constant(constant)
        (name,) = constant.sources
        return self.constants.rounded(name, self.steps[name], self.coding)

    def scalar(self, value: float) -> float | Tensor:
        if not self.steps:
            return value
        return self.constants.rounded(value, symmetric_step(0.0, value, self._bits), self.coding)

    @property
    def _bits(self) -> int:
        return next(iter(self.steps.values())).bits

    def zero(self, part: str) -> float | Tensor:
        if not self.steps:
            return 0.0
        return self.constants.rounded(0.0, self.steps[f"{self._node_name}.{part}"], self.coding)


class _QdqModule(nn.Module):
    def __init__(self, constants: Constants, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.constants, self._run = constants, run

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._run(*values)


@dataclass(frozen=True)
class QdqGraph:
    """A graph of pairs.

    The inputs of `module` are those of an interface, with the shapes of `example`. Its outputs are
    those of the interface, followed by the exposed values, if any. `value_names` are the names of
    the rounded values, without constants. Outputs that are codes have `steps`.
    """

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    value_names: tuple[str, ...]
    steps: tuple[Step, ...] = ()


def build_qdq_graph(
    program: Program,
    interface: Interface,
    steps: Mapping[str, Step],
    file: Parameters,
    coding: Coding,
    style: Style,
    *,
    expose_values: bool = False,
    coded: bool = False,
) -> QdqGraph:
    """Return the graph for calls of `interface`, with the constants of a file.

    `expose_values` adds every rounded value to the outputs. With `coded`, inputs and outputs are
    codes.
    """
    constants = Constants(file)
    named_values: list[tuple[str, Tensor]] = []

    def record(value: Tensor, name: str) -> Tensor:
        named_values.append((name, value))
        return value

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        named_values.clear()
        forms = QdqForms(program, interface, constants, steps, coding, record, style, coded=coded)
        outputs = run_program(forms, dict(zip(interface.inputs, values, strict=True)))
        return (*outputs.values(), *(value for _, value in named_values if expose_values))

    example = tuple(
        torch.zeros(shape, dtype=coding.dtypes[steps[name].bits] if coded else torch.float32)
        for name, shape in interface.inputs.items()
    )
    with torch.no_grad():
        run(*example)  # creates the parameters
        exported = export(_QdqModule(constants, run), example, strict=False)
    module = exported.module()
    _propagate_steps(module.graph)
    output_steps = _return_codes(module.graph, coding) if coded else ()
    module.recompile()
    return QdqGraph(module, example, tuple(name for name, _ in named_values), output_steps)


def _propagate_steps(graph: fx.Graph) -> None:
    """Insert a pair behind each operator that moves values, with the step of its input."""
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
            steps[_insert_pair(graph, node, steps[node])] = steps[node]


def _return_codes(graph: fx.Graph, coding: Coding) -> tuple[Step, ...]:
    """Drop the dequantization of the outputs; return the steps of the outputs."""
    output = graph.output_node()
    values: Any = output.args[0]
    output.args = (tuple(value.args[0] for value in values),)
    graph.eliminate_dead_code()
    return tuple(coding.step(*value.args[1:]) for value in values)


def _insert_pair(graph: fx.Graph, node: fx.Node, arguments: Sequence[Any]) -> fx.Node:
    with graph.inserting_after(node):
        codes = graph.call_function(QUANTIZE, (node, *arguments))
    with graph.inserting_after(codes):
        rounded = graph.call_function(DEQUANTIZE, (codes, *arguments))
    codes.meta["val"], rounded.meta["val"] = node.meta["val"].to(arguments[-1]), node.meta["val"]
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not codes)
    return rounded
