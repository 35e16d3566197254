"""From a fused program to a function of an ML program: one Python function an operator, in a table.

A function has a fixed number of tokens. Activations are float16; what float16 would spoil is
float32: the mean in a norm, the router of experts (a rounded score flips a choice), rotary angles,
and every operator on a constant that the plan keeps in float32. Nothing is rounded here and no bits
are chosen: codes and scales go into the file as `PackedTensor` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache as cached
from functools import partial
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Var, types
from torch import Tensor, fx

from lfmc.calib_free.pack import PackedTensor, split_rows
from lfmc.errors import UnsupportedError
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.program import Program
from lfmc.targets.base import Probe, find_handler
from lfmc.targets.coreml.constants import Constants
from lfmc.targets.coreml.dtypes import HALF, WIDE, cast
from lfmc.targets.coreml.moe import lower_moe
from lfmc.targets.coreml.names import output_name
from lfmc.targets.coreml.states import DIGIT, PackageState
from lfmc.targets.coreml.tall import lookup, product
from lfmc.weights import PlannedWeights

Result = Any  # a variable, several, or none: coremltools has no types

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
        tokens, positions, *states = (
            node for node in self.program.graph.nodes if node.op == "placeholder"
        )
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
        return find_handler(HANDLERS, node, "Core ML")(self, node)

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
        """Cosine and sine, float32 `[T, D / 2]`, of the positions' angles.

        A table of all positions would be as large as a small model. So a position is taken apart
        into digits of base 64 with a table each, and cos(a + b), sin(a + b) put them together.
        """
        if inv_freq not in self.values:
            kind = str(inv_freq.target).removeprefix("rope.")
            steps = inverse_frequencies(self.program.config, kind).double()
            rest, unit, turned = self.positions, 1, None
            while unit < self.context:
                digit = mb.mod(x=rest, y=np.int32(DIGIT))
                angles = torch.arange(DIGIT).double()[:, None] * unit * steps
                own = [
                    mb.gather(
                        x=self.constants.table(f"rope.{kind}.{unit}.{name}", table.float()),
                        indices=digit,
                        axis=0,
                    )
                    for name, table in (("cos", angles.cos()), ("sin", angles.sin()))
                ]
                turned = own if turned is None else _sum_of_angles(turned, own)
                rest = mb.floor_div(x=rest, y=np.int32(DIGIT))
                unit *= DIGIT
            self.values[inv_freq] = turned
        cos, sin = self.values[inv_freq]
        return cos, sin


def _names(name: str, cut: list[int]) -> list[str]:
    """Of each piece of a constant its name in the file."""
    return [name] if len(cut) == 1 else [f"{name}.piece{i}" for i in range(len(cut))]


def _sum_of_angles(a: Sequence[Var], b: Sequence[Var]) -> list[Var]:
    cos = mb.sub(x=mb.mul(x=a[0], y=b[0]), y=mb.mul(x=a[1], y=b[1]))
    sin = mb.add(x=mb.mul(x=a[1], y=b[0]), y=mb.mul(x=a[0], y=b[1]))
    return [cos, sin]


def _like(a: Var, b: Var) -> tuple[Var, Var]:
    """Both in the wider dtype of the two."""
    dtype = WIDE if WIDE in (a.dtype, b.dtype) else HALF
    return cast(a, dtype), cast(b, dtype)


Handler = Callable[[Lowering, fx.Node], Result]


def _embedding(low: Lowering, node: fx.Node) -> Var:
    table, ids, *_ = arguments(node)
    return lookup(low.matrix(table), low.value(ids), node.name)


def _embedding_nbits(low: Lowering, node: fx.Node) -> Var:
    ids, codes, _, _, bits, *_ = arguments(node)
    rows = lookup(low.matrix(codes), low.value(ids), node.name)
    return low.probe(node, f"gather {bits} bit", low.value(ids), rows)


def _linear(low: Lowering, node: fx.Node) -> Var:
    x, weight, bias = arguments(node)
    pieces = low.matrix(weight)
    return product(low, pieces, low.value(x, pieces[0].dtype), bias, node.name)


def _linear_nbits(low: Lowering, node: fx.Node) -> Var:
    x, codes, _, _, bias, bits, *_ = arguments(node)
    given = low.value(x, HALF)
    y = product(low, low.matrix(codes), given, bias, node.name)
    return low.probe(node, f"linear {bits} bit", given, y)


def _norm(low: Lowering, x: Var, weight: fx.Node, eps: Any) -> Var:
    """`weight * x / sqrt(mean(x^2) + eps)` in float32: a square above 65,504 is no float16."""
    wide = cast(x, WIDE)
    mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
    normed = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=np.float32(eps)))
    return mb.mul(x=normed, y=low.value(weight, WIDE))


def _rms_norm(low: Lowering, node: fx.Node) -> Var:
    x, weight, eps = arguments(node)
    return cast(_norm(low, low.value(x), weight, eps), HALF)


def _add_rms_norm(low: Lowering, node: fx.Node) -> Sequence[Var]:
    x, residual, weight, eps = arguments(node)
    total = mb.add(x=low.value(residual, HALF), y=low.value(x, HALF))
    return cast(_norm(low, total, weight, eps), HALF), total


def _gated_short_conv(low: Lowering, node: fx.Node) -> Sequence[Var]:
    bcx, weight, bias, state = arguments(node)
    gate, out_gate, x = mb.split(x=low.value(bcx, HALF), num_splits=3, axis=-1)
    seen = mb.concat(values=[low.value(state), mb.mul(x=gate, y=x)], axis=1)
    filters = low.value(weight)
    given = {} if bias is None else {"bias": low.value(bias, filters.dtype)}
    mixed = mb.conv(
        x=mb.transpose(x=cast(seen, filters.dtype), perm=[0, 2, 1]),
        weight=filters,
        groups=filters.shape[0],
        pad_type="valid",
        **given,
    )
    y = mb.mul(x=out_gate, y=cast(mb.transpose(x=mixed, perm=[0, 2, 1]), HALF))
    kept = low.values[state].shape[1]
    last = np.array([low.tokens], np.int32) if low.valid is None else low.valid
    zero = np.zeros(1, np.int32)
    begin = mb.concat(values=[zero, last, zero], axis=0)
    new = mb.slice_by_size(x=seen, begin=begin, size=[1, kept, seen.shape[2]])
    return y, new


def _attention(low: Lowering, node: fx.Node) -> Sequence[Var]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, tokens = low.program.config, low.tokens
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    cos, sin = low.rotation(inv_freq)

    def split(x: Var, count: int) -> Var:
        return mb.reshape(x=x, shape=[1, tokens, count, dim])

    def turned(x: Any, norm: fx.Node, count: int) -> Var:
        """Normalized and rotated, float32 `[1, count, T, D]`."""
        normed = _norm(low, split(low.value(x), count), norm, eps)
        first, second = mb.split(x=mb.transpose(x=normed, perm=[0, 2, 1, 3]), num_splits=2, axis=-1)
        return mb.concat(values=_sum_of_angles([first, second], [cos, sin]), axis=-1)

    # (x1, x2) turned is (x1 cos - x2 sin, x2 cos + x1 sin): the sum of two angles, scaled.
    queries = cast(mb.mul(x=turned(q, q_norm, heads), y=np.float32(dim**-0.5)), HALF)
    new_keys = _write(low, keys, cast(turned(k, k_norm, kv_heads), HALF))
    split_values = mb.transpose(x=split(low.value(v, HALF), kv_heads), perm=[0, 2, 1, 3])
    new_values = _write(low, values, split_values)
    # Queries that share a key head are rows of one product: keys are not repeated.
    grouped = mb.reshape(x=queries, shape=[1, kv_heads, heads // kv_heads * tokens, dim])
    scores = mb.matmul(x=grouped, y=new_keys, transpose_y=True)
    scores = mb.reshape(x=scores, shape=[1, heads, tokens, low.context])
    shares = mb.softmax(x=mb.add(x=scores, y=low.mask(window)), axis=-1)
    shares = mb.reshape(x=shares, shape=(*grouped.shape[:3], low.context))
    mixed = mb.reshape(x=mb.matmul(x=shares, y=new_values), shape=[1, heads, tokens, dim])
    return mb.transpose(x=mixed, perm=[0, 2, 1, 3]), new_keys, new_values


def _write(low: Lowering, cache: fx.Node, new: Var) -> Var:
    """The cache `[1, K, C, D]` with `new` `[1, K, T, D]` from the start position on."""
    old, zero = low.value(cache), np.zeros(1, np.int32)
    end = mb.add(x=low.start, y=np.int32(low.tokens))
    return mb.slice_update(
        x=old,
        update=new,
        begin=mb.concat(values=[zero, zero, low.start, zero], axis=0),
        end=mb.concat(values=[zero, zero, end, zero], axis=0),
        stride=[1, 1, 1, 1],
        begin_mask=[True, True, False, True],
        end_mask=[True, True, False, True],
    )


def _swiglu(low: Lowering, node: fx.Node) -> Var:
    gate, up = (low.value(x, HALF) for x in node.args)
    return mb.mul(x=mb.silu(x=gate), y=up)


def _sigmoid(low: Lowering, node: fx.Node) -> Var:
    return mb.sigmoid(x=low.value(node.args[0]))


def _split(low: Lowering, node: fx.Node) -> Sequence[Var]:
    x, sizes, dim = arguments(node)
    parts: Sequence[Var] = mb.split(x=low.value(x), split_sizes=list(sizes), axis=dim)
    return parts


def _getitem(low: Lowering, node: fx.Node) -> Var:
    source, index = arguments(node)
    return low.values[source][index]


def _flatten(low: Lowering, node: fx.Node) -> Var:
    x, start, end = arguments(node)
    given = low.value(x)
    end = end % len(given.shape)
    size = int(np.prod(given.shape[start : end + 1]))
    return mb.reshape(x=given, shape=[*given.shape[:start], size, *given.shape[end + 1 :]])


def _view_as(low: Lowering, node: fx.Node) -> Var:
    x, like = (low.value(arg) for arg in node.args)
    return mb.reshape(x=x, shape=list(like.shape))


def _unsqueeze(low: Lowering, node: fx.Node) -> Var:
    x, dim = node.args
    return mb.expand_dims(x=low.value(x), axes=[dim])


def _add(low: Lowering, node: fx.Node) -> Var:
    a, b = _like(*(low.value(x) for x in node.args))
    return mb.add(x=a, y=b)


def _mul(low: Lowering, node: fx.Node) -> Var:
    a, b = _like(*(low.value(x) for x in node.args))
    return mb.mul(x=a, y=b)


def _nothing(low: Lowering, node: fx.Node) -> None:
    """Read by the operator that uses it (an expert's codes, a symbolic size)."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _add,
    "aten.embedding": _embedding,
    "aten.flatten": _flatten,
    "aten.linear": _linear,
    "aten.mul": _mul,
    "aten.sigmoid": _sigmoid,
    "aten.split_with_sizes": _split,
    "aten.unsqueeze": _unsqueeze,
    "aten.view_as": _view_as,
    "getitem": _getitem,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.dequantize": _nothing,
    "lfm.embedding_nbits": _embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
