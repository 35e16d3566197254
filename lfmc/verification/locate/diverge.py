"""Where two models in torch part: the decoder and transformers, or a graph and what it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.calib_free.grid.formats import parse_format
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program, Weight, operator_name
from lfmc.graph.trace import trace
from lfmc.lowering.build import Build
from lfmc.machine.progress import Progress
from lfmc.parity.compare import FLOAT_TOLERANCE, Case, draw_tokens, run_case
from lfmc.parity.module_outputs import is_shown, module_outputs
from lfmc.parity.place import Place, parting
from lfmc.parity.transformers_reference import TransformersStepper
from lfmc.passes.base import apply
from lfmc.passes.pipeline import pipeline
from lfmc.run.stepper import Stepper, TorchStepper, decoder_stepper
from lfmc.verification.locate.cut import copied, parts, producer, read_weights

Values = Mapping[str, list[Tensor]]  # of each name, what it gave in call after call

_TOWER = "language_model."  # of a vision-language model: its decoder's modules lie below


def find_in_decoder(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Rung 1: the first module of the decoder whose result is not transformers'."""
    checkpoint = suspect.checkpoint
    decoder = checkpoint.decoder()
    side = decoder_stepper(decoder, case.length)
    reference = TransformersStepper(checkpoint)
    prompt, earlier = draw_tokens(case.length, checkpoint.config.vocab_size)
    progress.step("modules of both")
    with module_outputs(decoder) as ours:
        run_case(side, case, prompt, earlier)
    with module_outputs(reference.model) as theirs:
        run_case(reference, case, prompt, earlier)
    theirs = {name.replace(_TOWER, ""): values for name, values in theirs.items()}
    place = _first_apart(1, ours, theirs, case)
    if place is None:
        return None
    kind = type(decoder.get_submodule(place.name)).__name__
    return replace(place, part=_part_of(place.name), operator=kind)


def find_in_passes(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Rung 2: the first pass behind which the graph gives other results, and the first node."""
    checkpoint, weights, asked = suspect.checkpoint, suspect.weights, suspect.asked
    reference: Stepper = decoder_stepper(weights.decoder(), asked.context)
    prompt, earlier = draw_tokens(case.length, checkpoint.config.vocab_size)
    expected, _ = run_case(reference, case, prompt, earlier)
    spec = suspect.target.trace_spec(checkpoint.config, asked)
    program = trace(checkpoint.config, spec)
    formats = {row.name: parse_format(row.format) for row in weights.plan.rows}
    before: Values | None = None
    for name, step in [("trace", None), *((own.name, own) for own in pipeline(formats))]:
        progress.step(name)
        if step is not None:
            apply([step], program)
        logits, after = _run(program, suspect, case, prompt, earlier)
        parted = parting(logits, expected, FLOAT_TOLERANCE)
        if parted is None:
            before = after
            continue
        place = None if before is None else _first_apart(2, after, before, case)
        note = f"the first pass behind which logits differ is '{name}'"
        if place is None:
            return Place(
                2,
                "head",
                name,
                "logits",
                parted.difference,
                FLOAT_TOLERANCE,
                parted.corner(),
                case=case.name,
                token=parted.row,
                note=note,
            )
        return _in_graph(replace(place, note=note), program, before or {})
    return None


def _in_graph(place: Place, program: Program, before: Values) -> Place:
    """The place with its part, operator and weights; an operator that the pass wrote on the way to
    it is the culprit."""
    node = next(own for own in program.graph.nodes if own.name == place.name)
    source = producer(node)
    while source.name in before:  # it was there: what does it read that was not?
        new = [own for own in source.all_input_nodes if own.name not in before]
        if not new or new[0].op != "call_function":
            break
        source = producer(new[0])
    return replace(
        place,
        part=parts(program)[source],
        operator=operator_name(source),
        name=source.name,
        weights=read_weights(program, source),
    )


def _first_apart(rung: int, ours: Values, theirs: Values, case: Case) -> Place | None:
    """The first of our names, in the order in which they were run, whose values are not theirs."""
    agrees = None
    for name, values in ours.items():
        left, right = _rows(values), _rows(theirs.get(name, []))
        if left is None or right is None or left.shape != right.shape:
            continue
        parted = parting(left, right, FLOAT_TOLERANCE)
        if parted is None:
            agrees = name
            continue
        place = Place(
            rung,
            "",
            "",
            name,
            parted.difference,
            FLOAT_TOLERANCE,
            parted.corner(),
            case=case.name,
            agrees=agrees,
        )
        token = parted.row * (case.earlier + case.length) // len(left) - case.earlier
        if token < 0:
            return replace(place, note="it differs in the prompt before the reset")
        call = sum(end <= token for end in accumulate(case.calls))
        return replace(place, call=call, token=token)
    return None


def _rows(values: list[Tensor]) -> Tensor | None:
    """Values of call after call as rows; None where they have no columns in common."""
    if not values or len({value.shape[-1] for value in values}) > 1:
        return None
    return torch.cat([value.flatten(0, -2) for value in values])


def _part_of(name: str) -> str:
    """ "embedding", "layer 3" or "head", by the name of a module."""
    pieces = name.split(".")
    if "layers" in pieces:
        return f"layer {pieces[pieces.index('layers') + 1]}"
    return "embedding" if pieces[-1] == "embed_tokens" else "head"


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gives."""

    def __init__(self, module: fx.GraphModule, found: dict[str, list[Tensor]]) -> None:
        super().__init__(module)
        self._found = found

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op == "call_function" and is_shown(value):
            self._found.setdefault(node.name, []).append(value.detach())
        return value


def _run(
    program: Program, suspect: Build, case: Case, prompt: Tensor, earlier: Tensor
) -> tuple[Tensor, Values]:
    """Logits of a case, and what every node of the program gives."""
    made = copied(program)
    made.bind(lambda name, weight: _value(suspect.weights, name, weight))
    found: dict[str, list[Tensor]] = {}

    def forward(*inputs: Tensor) -> tuple[Any, ...]:
        results: Iterable[Any] = _Recorder(made.module, found).run(*inputs)
        return tuple(results)

    stepper = TorchStepper(forward, program.config, suspect.asked.context)
    logits, _ = run_case(stepper, case, prompt, earlier)
    return logits, found


def _value(weights: PlannedWeights, name: str, weight: Weight) -> Tensor:
    """A constant of a graph whose matrices are not quantized yet: then they are dequantized."""
    if weight.part != "values":
        return weights.value(name, weight)
    return torch.cat([weights.dequantized(source) for source in weight.sources])
