"""From a fused program to a function of an ML program, and what its operators share.

A function has a fixed number of tokens. Activations are float16; what float16 would spoil is
float32: the mean in a norm, the router of experts (a rounded score flips a choice), rotary angles,
and every operator on a constant that the plan keeps in float32. Nothing is rounded here and no bits
are chosen: codes and scales go into the file as `PackedTensor` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as cached
from functools import partial
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

Result = Any  # a variable, several, or none: coremltools has no types
Handler = Callable[["Lowering", fx.Node], Result]

HIDDEN = -1e4  # what a mask adds: its exponential is 0 in float16


@dataclass(frozen=True)
class Form:
    """What a user may choose of a program's form.

    `dense`: decode, too, multiplies with every expert. `limit`: matrices of more rows are stored
    and used in pieces of so many.
    """

    dense: bool = False
    limit: int | None = None


@dataclass
class Lowering:
    """One program on its way into a function of `tokens` tokens.

    `padded` functions have an input `valid`: how many of the tokens count. Those behind do not
    reach the filters' states; keys and values of theirs are overwritten by what comes next.
    """

    program: Program
    weights: PlannedWeights
    states: Sequence[PackageState]
    context: int
    tokens: int
    padded: bool
    constants: Constants
    form: Form
    handlers: Mapping[str, Handler]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    probed: list[Probe] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)

    def run(self, opset: Any) -> Function:
        """The function; its inputs are `input_ids`, `position`, perhaps `valid`, and the states."""
        given: dict[str, Any] = {
            "input_ids": mb.TensorSpec((1, self.tokens), types.int32),
            "position": mb.TensorSpec((1,), types.int32),
        }
        if self.padded:
            given["valid"] = mb.TensorSpec((1,), types.int32)
        for state in self.states:
            spec = mb.StateTensorSpec if state.kept else mb.TensorSpec
            given[state.name] = spec(state.shape, HALF)
        with Function(given, opset_version=opset) as function:
            self._inputs(function)
            for node in self.program.graph.nodes:
                if node.op == "call_function":
                    self.values[node] = self._call(node)
                elif node.op == "output":
                    function.set_outputs(self._outputs(node))
        return function

    def value(self, node: Any, dtype: Any = None) -> Var:
        """The variable of a node, in a dtype; constants are written when first asked for."""
        if node not in self.values:
            name = str(node.target)
            sources = self.program.weights[name].sources
            value = partial(self.weights.floats, sources)
            self.values[node] = self.constants.values(name, sources, value, "rows")
        value = self.values[node]
        if not isinstance(value, Var):
            raise UnsupportedError("a Core ML operator got no tensor", got=str(node))
        return value if dtype is None else cast(value, dtype)

    def matrix(self, node: fx.Node) -> list[Var]:
        """The matrix `[N, K]` behind a node of codes or of floats, in pieces of rows."""
        name = str(node.target)
        weight = self.program.weights[name]
        shape = (self.weights.checkpoint.tensors[source].shape for source in weight.sources)
        rows = sum(size[0] for size in shape)
        if node not in self.values:
            make = self._quantized if weight.part == "codes" else self._floats
            self.values[node] = make(name.removesuffix(".codes"), weight.sources, self._cut(rows))
        pieces: list[Var] = self.values[node]
        return pieces

    def _cut(self, rows: int) -> list[int]:
        """How many rows each piece of a matrix has."""
        limit = self.form.limit or rows
        return [min(limit, rows - start) for start in range(0, rows, limit)]

    def _quantized(self, name: str, sources: tuple[str, ...], cut: list[int]) -> list[Var]:
        made = cached(lambda: split_rows(self.weights.packed(sources), cut))

        def piece(index: int) -> list[PackedTensor]:
            return [made()[index]]

        return [
            self.constants.matrix(own, sources, partial(piece, index), "rows")
            for index, own in enumerate(_names(name, cut))
        ]

    def _floats(self, name: str, sources: tuple[str, ...], cut: list[int]) -> list[Var]:
        made = cached(lambda: self.weights.floats(sources).split(cut))

        def piece(index: int) -> Tensor:
            own: Tensor = made()[index]
            return own

        return [
            self.constants.values(own, sources, partial(piece, index), "rows")
            for index, own in enumerate(_names(name, cut))
        ]

    def zeros(self, size: int, dtype: Any) -> Var:
        """A constant `[size]` of zeros, the same wherever one is needed."""
        kind = types.builtin_to_string(dtype)
        made = torch.zeros(size, dtype=torch.float16 if kind == "fp16" else torch.float32)
        return self.constants.table(f"zeros.{kind}.{size}", made)

    def probe(self, node: fx.Node, kind: str, given: Var, result: Var) -> Var:
        """Note an n-bit operator, for a comparison of its own; returns its result."""
        self.probed.append(Probe(node.name, kind, (given.name,), result.name))
        return result

    def _inputs(self, function: Function) -> None:
        tokens, positions, *states = self.program.inputs
        given = function.inputs
        self.values[tokens] = given["input_ids"]
        self.start = given["position"]
        steps = np.arange(self.tokens, dtype=np.int32)
        self.positions = mb.add(x=self.start, y=steps, name="positions")
        self.values[positions] = self.positions
        self.valid = given.get("valid")
        for node, state in zip(states, self.states, strict=True):
            held = given[state.name]
            self.values[node] = mb.read_state(input=held) if state.kept else held
        self.held = {state.name: given[state.name] for state in self.states}
        self._masks: dict[int, Var] = {}

    def _outputs(self, node: fx.Node) -> list[Var]:
        logits, *states = arguments(node)[0]
        found = [mb.identity(x=self.value(logits, HALF), name="logits")]
        for value, state in zip(states, self.states, strict=True):
            new = self.value(value, HALF)
            if state.kept:
                mb.coreml_update_state(state=self.held[state.name], value=new)
            else:
                found.append(mb.identity(x=new, name=output_name(state.name)))
        return found

    def _call(self, node: fx.Node) -> Result:
        return find_handler(self.handlers, node, "Core ML")(self, node)

    def mask(self, window: int) -> Var:
        """What attention adds to its scores, float16 `[T, C]`; one a kind of layer."""
        if window not in self._masks:
            slots = mb.range_1d(start=np.int32(0), end=np.int32(self.context), step=np.int32(1))
            slots = mb.expand_dims(x=slots, axes=[0])
            now = mb.expand_dims(x=self.positions, axes=[1])
            hidden = mb.greater(x=slots, y=now)
            if window:
                early = mb.less_equal(x=slots, y=mb.sub(x=now, y=np.int32(window)))
                hidden = mb.logical_or(x=hidden, y=early)
            added = mb.mul(x=cast(hidden, HALF), y=np.float16(HIDDEN))
            self._masks[window] = mb.identity(x=added, name=f"mask_{window or 'full'}")
        return self._masks[window]

    def rotation(self, inv_freq: fx.Node) -> tuple[Var, Var]:
        """Cosine and sine, float32 `[T, D / 2]`, of the positions' angles."""
        if inv_freq not in self.values:
            kind = str(inv_freq.target).removeprefix("rope.")
            steps = inverse_frequencies(self.program.config, kind).double()
            self.values[inv_freq] = rotation(
                self.constants, self.positions, f"rope.{kind}", steps, self.context
            )
        cos, sin = self.values[inv_freq]
        return cos, sin


def _names(name: str, cut: list[int]) -> list[str]:
    """Of each piece of a constant its name in the file."""
    return [name] if len(cut) == 1 else [f"{name}.piece{i}" for i in range(len(cut))]
