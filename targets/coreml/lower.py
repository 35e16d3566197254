"""Lower a fused program to a function of an ML program.

A function has a fixed number of tokens. Activations are float16, except where float16 is too
inexact. These parts are float32: the mean in a norm, the router of experts (a rounded score may
change the choice), rotary angles, and every operator on a constant that the plan keeps in float32.
This module rounds nothing and chooses no bits: it writes the codes and scales of `PackedTensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Var, types
from torch import Tensor, fx

from lfmc.calib_free.grid.packed_tensor import PackedTensor, split_rows
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.base import Probe, find_handler
from lfmc.targets.coreml.constants import Constants
from lfmc.targets.coreml.dtypes import HALF, cast
from lfmc.targets.coreml.names import output_name
from lfmc.targets.coreml.rotary import rotation
from lfmc.targets.coreml.states import PackageState

Result = Any  # a variable, a sequence of variables, or None: coremltools has no type hints
Handler = Callable[["Lowering", fx.Node], Result]

MASKED = -1e4  # added to masked scores; its exponential is 0 in float16


@dataclass(frozen=True)
class LoweringOptions:
    """The options that change the structure of the program.

    With `dense_decode`, decode multiplies with every expert, as prefill does. Matrices of more
    than `max_rows` rows are stored and multiplied in pieces of at most that many rows.
    """

    dense_decode: bool = False
    max_rows: int | None = None


@dataclass
class Lowering:
    """The lowering of one program to a function of `tokens` tokens.

    A `padded` function has an input `valid`: the number of tokens that are not padding. Padding
    does not enter the filters' states. Later tokens overwrite its keys and values.
    """

    program: Program
    weights: PlannedWeights
    states: Sequence[PackageState]
    context: int
    tokens: int
    padded: bool
    constants: Constants
    options: LoweringOptions
    handlers: Mapping[str, Handler]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    # Names of the variables with the chosen experts, one per sparse layer.
    choice_names: list[str] = field(default_factory=list)

    def run(self, opset: Any) -> Function:
        """Return the function. Inputs: `input_ids`, `position`, `valid` if padded, and states."""
        input_specs: dict[str, Any] = {
            "input_ids": mb.TensorSpec((1, self.tokens), types.int32),
            "position": mb.TensorSpec((1,), types.int32),
        }
        if self.padded:
            input_specs["valid"] = mb.TensorSpec((1,), types.int32)
        for state in self.states:
            spec = mb.StateTensorSpec if state.in_mlstate else mb.TensorSpec
            input_specs[state.name] = spec(state.shape, HALF)
        with Function(input_specs, opset_version=opset) as function:
            self._read_inputs(function)
            for node in self.program.graph.nodes:
                if node.op == "call_function":
                    self.values[node] = self._call(node)
                elif node.op == "output":
                    function.set_outputs(self._write_outputs(node))
        return function

    def value(self, node: Any, dtype: Any = None) -> Var:
        """Return the variable of a node, cast to `dtype`. Write a constant at its first use."""
        if node not in self.values:
            name = str(node.target)
            sources = self.program.weights[name].sources
            value = partial(self.weights.floats, sources)
            self.values[node] = self.constants.values(name, sources, value, "rows")
        value = self.values[node]
        if not isinstance(value, Var):
            raise UnsupportedError("the input of a Core ML operator is not a tensor", got=str(node))
        return value if dtype is None else cast(value, dtype)

    def matrix(self, node: fx.Node) -> list[Var]:
        """Return the matrix `[N, K]` of a node (codes or floats), as pieces of its rows."""
        name = str(node.target)
        weight = self.program.weights[name]
        shape = (self.weights.checkpoint.tensors[source].shape for source in weight.sources)
        rows = sum(size[0] for size in shape)
        if node not in self.values:
            write = self._quantized if weight.part == "codes" else self._floats
            sizes = self._piece_sizes(rows)
            self.values[node] = write(name.removesuffix(".codes"), weight.sources, sizes)
        pieces: list[Var] = self.values[node]
        return pieces

    def _piece_sizes(self, rows: int) -> list[int]:
        """Return the number of rows of each piece of a matrix."""
        limit = self.options.max_rows or rows
        return [min(limit, rows - start) for start in range(0, rows, limit)]

    def _quantized(self, name: str, sources: tuple[str, ...], sizes: list[int]) -> list[Var]:
        pieces = cache(lambda: split_rows(self.weights.packed(sources), sizes))

        def piece(index: int) -> list[PackedTensor]:
            return [pieces()[index]]

        return [
            self.constants.matrix(piece_name, sources, partial(piece, index), "rows")
            for index, piece_name in enumerate(_piece_names(name, sizes))
        ]

    def _floats(self, name: str, sources: tuple[str, ...], sizes: list[int]) -> list[Var]:
        pieces = cache(lambda: self.weights.floats(sources).split(sizes))

        def piece(index: int) -> Tensor:
            tensor: Tensor = pieces()[index]
            return tensor

        return [
            self.constants.values(piece_name, sources, partial(piece, index), "rows")
            for index, piece_name in enumerate(_piece_names(name, sizes))
        ]

    def zeros(self, size: int, dtype: Any) -> Var:
        """Return a constant `[size]` of zeros, shared by all its uses."""
        kind = types.builtin_to_string(dtype)
        tensor = torch.zeros(size, dtype=torch.float16 if kind == "fp16" else torch.float32)
        return self.constants.table(f"zeros.{kind}.{size}", tensor)

    def probe(self, node: fx.Node, kind: str, x: Var, result: Var) -> Var:
        """Record an n-bit operator for operator parity, and return its result."""
        self.probes.append(Probe(node.name, kind, (x.name,), result.name))
        return result

    def _read_inputs(self, function: Function) -> None:
        tokens, positions, *states = self.program.inputs
        inputs = function.inputs
        self.values[tokens] = inputs["input_ids"]
        self.start = inputs["position"]
        steps = np.arange(self.tokens, dtype=np.int32)
        self.positions = mb.add(x=self.start, y=steps, name="positions")
        self.values[positions] = self.positions
        self.valid = inputs.get("valid")
        for node, state in zip(states, self.states, strict=True):
            var = inputs[state.name]
            self.values[node] = mb.read_state(input=var) if state.in_mlstate else var
        self._state_inputs = {state.name: inputs[state.name] for state in self.states}
        self._masks: dict[int, Var] = {}

    def _write_outputs(self, node: fx.Node) -> list[Var]:
        logits, *states = arguments(node)[0]
        outputs = [mb.identity(x=self.value(logits, HALF), name="logits")]
        for value, state in zip(states, self.states, strict=True):
            new = self.value(value, HALF)
            if state.in_mlstate:
                mb.coreml_update_state(state=self._state_inputs[state.name], value=new)
            else:
                outputs.append(mb.identity(x=new, name=output_name(state.name)))
        return outputs

    def _call(self, node: fx.Node) -> Result:
        return find_handler(self.handlers, node, "Core ML")(self, node)

    def mask(self, window: int) -> Var:
        """Return the additive mask of attention, float16 `[T, C]`; one per window size."""
        if window not in self._masks:
            slots = mb.range_1d(start=np.int32(0), end=np.int32(self.context), step=np.int32(1))
            slots = mb.expand_dims(x=slots, axes=[0])
            positions = mb.expand_dims(x=self.positions, axes=[1])
            is_masked = mb.greater(x=slots, y=positions)
            if window:
                before_window = mb.less_equal(x=slots, y=mb.sub(x=positions, y=np.int32(window)))
                is_masked = mb.logical_or(x=is_masked, y=before_window)
            mask = mb.mul(x=cast(is_masked, HALF), y=np.float16(MASKED))
            self._masks[window] = mb.identity(x=mask, name=f"mask_{window or 'full'}")
        return self._masks[window]

    def rotation(self, inv_freq: fx.Node) -> tuple[Var, Var]:
        """Return cosine and sine, float32 `[T, D / 2]`, of the rotary angles of the positions."""
        if inv_freq not in self.values:
            kind = str(inv_freq.target).removeprefix("rope.")
            steps = inverse_frequencies(self.program.config, kind).double()
            self.values[inv_freq] = rotation(
                self.constants, self.positions, f"rope.{kind}", steps, self.context
            )
        cos, sin = self.values[inv_freq]
        return cos, sin


def _piece_names(name: str, sizes: list[int]) -> list[str]:
    """Return the name of each piece of a constant in the file."""
    return [name] if len(sizes) == 1 else [f"{name}.piece{i}" for i in range(len(sizes))]
