"""Faults of lowering, one a row: a target that has one lowers something else than it is given.

An `edit` changes a copy of the program that the target gets, `stored` a tensor on its way into the
artifact; what the artifact is compared with stays right. So a fault is made alike in every target,
in the whole program and in all that a trace cuts out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.calib_free.pack import PackedTensor, stack_rows
from lfmc.cut import copied, parts, read_weights
from lfmc.model import Rope
from lfmc.program import Program
from lfmc.targets.base import Artifact, Request, Target
from lfmc.weights import PlannedWeights

Edit = Callable[[Program], None]
FUNCTIONAL = frozenset({"onnx", "coreml", "mlir"})  # states are values there, not written in place
ALL = frozenset({"onnx", "coreml", "executorch", "tvm", "mlir"})
ONNX = frozenset({"onnx"})


@dataclass(frozen=True)
class Fault:
    """What is wrong, in which kind of model (`tests.factories.KINDS`), and what has to name it.

    `part` and `operator` are the place that a trace must name: an operator of a layer, or of a
    stored tensor which piece, and then `tensor` is a part of its name. `targets` can have it.
    """

    name: str
    about: str
    kind: str
    part: str
    operator: str
    edit: Edit | None = None
    stored: Mapping[str, Callable[[PackedTensor], PackedTensor]] = field(default_factory=dict)
    floats: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    sources: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None
    targets: frozenset[str] = ALL
    tensor: str = ""

    @property
    def is_stored(self) -> bool:
        return self.edit is None


@dataclass(frozen=True)
class FaultyTarget:
    """A target that lowers with a fault; all else is the target's own."""

    target: Target
    fault: Fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        given = copied(program)
        if self.fault.edit is not None:
            with torch.no_grad():
                self.fault.edit(given)
        wrong = FaultyWeights(weights.checkpoint, weights.plan, fault=self.fault, right=weights)
        with knowing_softmax(self.target.name):
            return self.target.lower(given, wrong, request, folder)


@dataclass
class FaultyWeights(PlannedWeights):
    """Weights of which some are not those that `right` has."""

    fault: Fault = field(kw_only=True)
    right: PlannedWeights = field(kw_only=True)

    def packed(self, sources: tuple[str, ...]) -> PackedTensor:
        order = sources if self.fault.sources is None else self.fault.sources(sources)
        return stack_rows([self._wrong(name) for name in order])

    def _wrong(self, name: str) -> PackedTensor:
        packed = self.right.packed((name,))
        for part, change in self.fault.stored.items():
            packed = change(packed) if part in name else packed
        return packed

    def floats(self, sources: tuple[str, ...]) -> Tensor:
        return torch.cat([self._wrong_floats(name) for name in sources])

    def _wrong_floats(self, name: str) -> Tensor:
        value = self.right.floats((name,))
        for part, change in self.fault.floats.items():
            value = change(value) if part in name else value
        return value


def calls(program: Program, operator: str, part: str, reads: str = "") -> list[fx.Node]:
    """Calls of an operator in a part of the model that read a weight of such a name."""
    where = parts(program)
    return [
        node
        for node in program.nodes(operator)
        if where[node] == part and reads in " ".join(read_weights(program, node))
    ]


def with_argument(operator: str, part: str, place: int, value: Any, reads: str = "") -> Edit:
    """An edit that gives calls another argument; a function makes it from the node."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part, reads):
            new = value(node) if callable(value) else value
            node.args = (*node.args[:place], new, *node.args[place + 1 :])

    return edit


def exchanged(operator: str, part: str, first: int, second: int) -> Edit:
    """An edit that exchanges two arguments."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part):
            args = list(node.args)
            args[first], args[second] = args[second], args[first]
            node.args = tuple(args)

    return edit


def skipped(operator: str, part: str, reads: str = "") -> Edit:
    """An edit that puts an operator's first input in place of its result."""

    def edit(program: Program) -> None:
        for node in calls(program, operator, part, reads):
            node.replace_all_uses_with(node.args[0])

    return edit


class _OneStepOn(float):
    """A rotary base whose powers are those of the next pair of dims."""

    def __pow__(self, steps: Any) -> Any:
        return float(self) ** (steps + steps[1])


def rope_off_by_one(program: Program) -> None:
    ropes = {
        kind: Rope(_OneStepOn(rope.theta), rope.partial)
        for kind, rope in program.config.rope.items()
    }
    program.config = replace(program.config, rope=ropes)


def states_of(program: Program, kind: str) -> list[int]:
    """Places of the states of a kind among the outputs."""
    return [1 + at for at, spec in enumerate(program.states) if spec.kind == kind]


def stale_state(kind: str) -> Edit:
    """An edit that gives the first state of a kind back as it came."""

    def edit(program: Program) -> None:
        output = program.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        given = [node for node in program.graph.nodes if node.op == "placeholder"][2:]
        place = states_of(program, kind)[0]
        state = given[place - 1]
        with program.graph.inserting_before(output):
            results[place] = program.call(torch.ops.aten.view_as.default, state, state)
        output.args = (results,)

    return edit


def states_exchanged(program: Program) -> None:
    output = program.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    first, second = states_of(program, "conv")[:2]
    results[first], results[second] = results[second], results[first]
    output.args = (results,)


def raw_gate(program: Program) -> None:
    for node in calls(program, "aten.sigmoid", "layer 1"):
        node.replace_all_uses_with(node.args[0])


def gain_of_another_layer(program: Program) -> None:
    others = calls(program, "lfm.add_rms_norm", "layer 1", "ffn_norm")
    for node in calls(program, "lfm.add_rms_norm", "layer 2", "ffn_norm"):
        node.args = (*node.args[:2], others[0].args[2], *node.args[3:])


def _roll_scales(packed: PackedTensor) -> PackedTensor:
    return replace(packed, scales=packed.scales.roll(1, dims=1))


def _turn_groups(packed: PackedTensor) -> PackedTensor:
    groups = packed.codes.unflatten(1, (packed.scales.shape[1], -1))
    return replace(packed, codes=groups.flip(1).flatten(1))


def _no_zero_point(packed: PackedTensor) -> PackedTensor:
    if packed.zeros is None:
        return packed
    return replace(packed, zeros=torch.full_like(packed.zeros, 1 << (packed.format.bits - 1)))


def _swap_nibbles(packed: PackedTensor) -> PackedTensor:
    return replace(packed, codes=packed.codes.unflatten(1, (-1, 2)).flip(-1).flatten(1))


def _scale_of_next_row(packed: PackedTensor) -> PackedTensor:
    return replace(packed, scales=packed.scales.roll(1, dims=0))


def _experts_exchanged(sources: tuple[str, ...]) -> tuple[str, ...]:
    turn = {".experts.0.": ".experts.1.", ".experts.1.": ".experts.0."}
    return tuple(
        next((name.replace(old, new) for old, new in turn.items() if old in name), name)
        for name in sources
    )


def _in_other_order(sources: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(reversed(sources)) if "q_proj" in sources[0] else sources


def _turn_sign(packed: PackedTensor) -> PackedTensor:
    return replace(packed, codes=packed.codes ^ (1 << (packed.format.bits - 1)))


def softmax_router(program: Program) -> None:
    for node in calls(program, "aten.sigmoid", "layer 2"):
        with program.graph.inserting_after(node):
            program.replace(node, program.call(torch.ops.aten.softmax.int, node.args[0], -1))


def _softmax_forms(target: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A target's table of forms, and one for the operator that no LFM has."""
    if target == "onnx":
        from lfmc.targets.onnx import lower as onnx

        return onnx.HANDLERS, lambda low, node: low.emit.op(
            "Softmax", low.value(node.args[0]), axis=-1
        )
    from coremltools.converters.mil import Builder

    from lfmc.targets.coreml import lower as coreml

    return coreml.HANDLERS, lambda low, node: Builder.softmax(x=low.value(node.args[0]), axis=-1)


@contextmanager
def knowing_softmax(target: str) -> Iterator[None]:
    """A target that has a form for a softmax of its own, where it runs no plain operators."""
    if target not in ("onnx", "coreml"):
        yield
        return
    table, form = _softmax_forms(target)
    table["aten.softmax"] = form
    try:
        yield
    finally:
        del table["aten.softmax"]


def stored_fault(
    name: str,
    about: str,
    kind: str,
    piece: str,
    tensor: str,
    packed: Callable[[PackedTensor], PackedTensor] | None = None,
    *,
    floats: Callable[[Tensor], Tensor] | None = None,
    sources: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None,
) -> Fault:
    """A fault of a tensor's `piece`: codes, scales, zeros or values."""
    return Fault(
        name,
        about,
        kind,
        "stored tensor",
        piece,
        stored={} if packed is None else {tensor: packed},
        floats={} if floats is None else {tensor: floats},
        sources=sources,
        tensor=tensor,
    )


FAULTS = (
    Fault(
        "w1 and w3 swapped",
        "the gate and the other half of a dense feed-forward change places",
        "lfm2",
        "layer 1",
        "lfm.swiglu",
        exchanged("lfm.swiglu", "layer 1", 0, 1),
    ),
    Fault(
        "experts' w1 and w3 swapped",
        "the same in every expert of a layer",
        "lfm2_moe",
        "layer 2",
        "lfm.moe",
        exchanged("lfm.moe", "layer 2", 3, 4),
    ),
    Fault(
        "missing expert bias",
        "experts are chosen by their scores alone",
        "lfm2_moe",
        "layer 1",
        "lfm.moe",
        with_argument("lfm.moe", "layer 1", 2, lambda node: node.args[1]),
    ),
    Fault(
        "bias in the scores",
        "the expert bias takes part in the weights, not only in the choice",
        "lfm2_moe",
        "layer 3",
        "lfm.moe",
        with_argument("lfm.moe", "layer 3", 1, lambda node: node.args[2]),
    ),
    Fault(
        "shares not normalized",
        "the chosen experts' weights do not sum to one",
        "lfm2_moe",
        "layer 1",
        "lfm.moe",
        with_argument("lfm.moe", "layer 1", 7, False),
    ),
    Fault(
        "routing scale dropped",
        "what experts give is not multiplied by the routing scale",
        "lfm2_moe-scaled",
        "layer 2",
        "lfm.moe",
        with_argument("lfm.moe", "layer 2", 8, 1.0),
    ),
    Fault(
        "one expert too few",
        "each token goes to one expert less",
        "lfm2_moe",
        "layer 3",
        "lfm.moe",
        with_argument("lfm.moe", "layer 3", 6, 1),
    ),
    Fault(
        "rope off by one",
        "each pair of dims turns by the angle of the next one",
        "lfm2",
        "layer 1",
        "lfm.attention",
        rope_off_by_one,
    ),
    Fault(
        "sliding window off by one",
        "a layer sees one position less than it should",
        "lfm3",
        "layer 1",
        "lfm.attention",
        with_argument("lfm.attention", "layer 1", 10, 7),
    ),
    Fault(
        "sliding window dropped",
        "a sliding layer sees every position",
        "lfm3",
        "layer 1",
        "lfm.attention",
        with_argument("lfm.attention", "layer 1", 10, 0),
    ),
    Fault(
        "q and k norms swapped",
        "queries are scaled by the gains of keys, and keys by those of queries",
        "lfm2",
        "layer 3",
        "lfm.attention",
        exchanged("lfm.attention", "layer 3", 3, 4),
    ),
    Fault(
        "keys and values swapped",
        "the projections of keys and of values change places",
        "lfm3",
        "layer 2",
        "lfm.attention",
        exchanged("lfm.attention", "layer 2", 1, 2),
    ),
    Fault(
        "heads not gated",
        "the gate of attention's heads lacks its sigmoid",
        "lfm3",
        "layer 1",
        "aten.sigmoid",
        raw_gate,
    ),
    Fault(
        "norm behind a block skipped",
        "the second norm of a sandwich is left out",
        "lfm3",
        "layer 2",
        "lfm.rms_norm",
        skipped("lfm.rms_norm", "layer 2", "post_ffn_norm"),
    ),
    Fault(
        "wrong epsilon",
        "a norm adds 1e-2 to the mean square, not 1e-5",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        with_argument("lfm.add_rms_norm", "layer 2", 3, 1e-2, "operator_norm"),
    ),
    Fault(
        "residual lost",
        "a block's result is added to itself, not to what came in",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        with_argument("lfm.add_rms_norm", "layer 2", 1, lambda node: node.args[0], "ffn_norm"),
    ),
    Fault(
        "gain of another layer",
        "a norm is given the gains of the layer before",
        "lfm2",
        "layer 2",
        "lfm.add_rms_norm",
        gain_of_another_layer,
    ),
    Fault(
        "stale conv state",
        "a filter's state is given back as it came",
        "lfm2",
        "layer 0",
        "lfm.gated_short_conv",
        stale_state("conv"),
        targets=FUNCTIONAL,
    ),
    Fault(
        "conv states exchanged",
        "two layers get each other's state with the next call",
        "lfm2",
        "layer 0",
        "lfm.gated_short_conv",
        states_exchanged,
        targets=FUNCTIONAL,
    ),
    Fault(
        "stale keys",
        "a cache of keys is given back as it came",
        "lfm2",
        "layer 1",
        "lfm.attention",
        stale_state("key"),
        targets=FUNCTIONAL,
    ),
    Fault(
        "softmax router",
        "scores of experts compete by a softmax; each should be a sigmoid of its own",
        "lfm2_moe",
        "layer 2",
        "aten.sigmoid",
        softmax_router,
        targets=frozenset({"onnx", "coreml", "mlir"}),
    ),
    Fault(
        "missing filter bias",
        "the short convolution has no bias",
        "lfm2-conv-bias",
        "layer 2",
        "lfm.gated_short_conv",
        with_argument("lfm.gated_short_conv", "layer 2", 2, None),
    ),
    stored_fault(
        "dropped zero point",
        "codes are centred, whatever their zero points",
        "lfm2",
        "zeros",
        "layers.1.self_attn.q_proj",
        _no_zero_point,
    ),
    stored_fault(
        "scales one group off",
        "each group of a row has the scale of the one before",
        "lfm2",
        "scales",
        "layers.0.conv.in_proj",
        _roll_scales,
    ),
    stored_fault(
        "scales one row off",
        "each row has the scales of the one before",
        "lfm2",
        "scales",
        "layers.2.feed_forward.w2",
        _scale_of_next_row,
    ),
    stored_fault(
        "wrong group order",
        "a row's groups of codes stand from the last to the first",
        "lfm3",
        "codes",
        "layers.2.self_attn.o_proj",
        _turn_groups,
    ),
    stored_fault(
        "nibbles swapped",
        "the two codes of a byte change places",
        "lfm2",
        "codes",
        "embed_tokens",
        _swap_nibbles,
    ),
    stored_fault(
        "codes of the other sign",
        "the highest bit of every code is turned",
        "lfm2_moe",
        "codes",
        "layers.3.feed_forward.experts.4.w2",
        _turn_sign,
    ),
    stored_fault(
        "experts exchanged",
        "two experts of a layer lie in each other's place",
        "lfm2_moe",
        "codes",
        "layers.1.feed_forward.experts.0",
        sources=_experts_exchanged,
    ),
    stored_fault(
        "merged rows in another order",
        "of q, k and v in one matrix, v comes first",
        "lfm2",
        "codes",
        "layers.1.self_attn.q_proj",
        sources=_in_other_order,
    ),
    stored_fault(
        "transposed conv kernel",
        "a filter's taps stand from the newest to the oldest",
        "lfm2",
        "values",
        "layers.0.conv.conv",
        floats=lambda value: value.flip(-1),
    ),
    stored_fault(
        "rounded router",
        "the router's weights are rounded once more, to bfloat16",
        "lfm2_moe",
        "values",
        "layers.2.feed_forward.gate",
        floats=lambda value: value.bfloat16().to(value.dtype),
    ),
    stored_fault(
        "centred gains",
        "the gains of a norm are stored less one",
        "lfm2",
        "values",
        "layers.3.ffn_norm",
        floats=lambda value: value - 1,
    ),
)
