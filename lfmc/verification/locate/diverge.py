"""Finds where two torch models diverge: decoder and transformers, or two states of a graph."""

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
from lfmc.parity.module_outputs import has_float_rows, record_module_outputs
from lfmc.parity.place import Place, find_mismatch
from lfmc.parity.transformers_reference import TransformersStepper
from lfmc.passes.base import apply
from lfmc.passes.pipeline import pipeline
from lfmc.run.stepper import Stepper, TorchStepper, decoder_stepper
from lfmc.verification.locate.cut import copy_program, parts_by_node, producing_node, source_tensors

Values = Mapping[str, list[Tensor]]  # name -> the values of consecutive calls

_TOWER = "language_model."  # prefix of the decoder's modules in a vision-language model


def find_in_decoder(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Return the first module of the decoder whose output differs from transformers (rung 1)."""
    checkpoint = suspect.checkpoint
    decoder = checkpoint.decoder()
    stepper = decoder_stepper(decoder, case.length)
    reference = TransformersStepper(checkpoint)
    prompt, earlier = draw_tokens(case.length, checkpoint.config.vocab_size)
    progress.step("modules of both models")
    with record_module_outputs(decoder) as actual:
        run_case(stepper, case, prompt, earlier)
    with record_module_outputs(reference.model) as expected:
        run_case(reference, case, prompt, earlier)
    expected = {name.replace(_TOWER, ""): values for name, values in expected.items()}
    place = _find_first_mismatch(1, actual, expected, case)
    if place is None:
        return None
    kind = type(decoder.get_submodule(place.name)).__name__
    return replace(place, part=_part_of_module(place.name), operator=kind)


def find_in_passes(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Return the first wrong node after the first pass that changes the logits (rung 2)."""
    checkpoint, weights, request = suspect.checkpoint, suspect.weights, suspect.request
    reference: Stepper = decoder_stepper(weights.decoder(), request.context)
    prompt, earlier = draw_tokens(case.length, checkpoint.config.vocab_size)
    expected, _ = run_case(reference, case, prompt, earlier)
    spec = suspect.target.trace_spec(checkpoint.config, request)
    program = trace(checkpoint.config, spec)
    formats = {row.name: parse_format(row.format) for row in weights.plan.rows}
    before: Values | None = None
    for name, step in [("trace", None), *((step.name, step) for step in pipeline(formats))]:
        progress.step(name)
        if step is not None:
            apply([step], program)
        logits, after = _run_program(program, suspect, case, prompt, earlier)
        mismatch = find_mismatch(logits, expected, FLOAT_TOLERANCE)
        if mismatch is None:
            before = after
            continue
        place = None if before is None else _find_first_mismatch(2, after, before, case)
        note = f"the first pass after which logits differ is '{name}'"
        if place is None:
            return Place(
                2,
                "head",
                name,
                "logits",
                mismatch.difference,
                FLOAT_TOLERANCE,
                mismatch.corner(),
                case=case.name,
                token=mismatch.row,
                note=note,
            )
        return _place_in_graph(replace(place, note=note), program, before or {})
    return None


def _place_in_graph(place: Place, program: Program, before: Values) -> Place:
    """Complete the place with its part, operator and weights.

    If the pass wrote new operators among the inputs of the node, the first of them is the place.
    """
    node = next(node for node in program.graph.nodes if node.name == place.name)
    operator = producing_node(node)
    while operator.name in before:  # the pass did not write this operator: look at its inputs
        new = [value for value in operator.all_input_nodes if value.name not in before]
        if not new or new[0].op != "call_function":
            break
        operator = producing_node(new[0])
    return replace(
        place,
        part=parts_by_node(program)[operator],
        operator=operator_name(operator),
        name=operator.name,
        weights=source_tensors(program, operator),
    )


def _find_first_mismatch(rung: int, actual: Values, expected: Values, case: Case) -> Place | None:
    """Return the place of the first name in `actual`, in order, whose values differ."""
    agrees = None
    for name, values in actual.items():
        actual_rows, expected_rows = _rows(values), _rows(expected.get(name, []))
        if actual_rows is None or expected_rows is None:
            continue
        if actual_rows.shape != expected_rows.shape:
            continue
        mismatch = find_mismatch(actual_rows, expected_rows, FLOAT_TOLERANCE)
        if mismatch is None:
            agrees = name
            continue
        place = Place(
            rung,
            "",
            "",
            name,
            mismatch.difference,
            FLOAT_TOLERANCE,
            mismatch.corner(),
            case=case.name,
            agrees=agrees,
        )
        token = mismatch.row * (case.earlier + case.length) // len(actual_rows) - case.earlier
        if token < 0:
            return replace(place, note="it differs in the prompt before the reset")
        call = sum(end <= token for end in accumulate(case.calls))
        return replace(place, call=call, token=token)
    return None


def _rows(values: list[Tensor]) -> Tensor | None:
    """Concatenate the values of all calls as rows; None if their last dims differ."""
    if not values or len({value.shape[-1] for value in values}) > 1:
        return None
    return torch.cat([value.flatten(0, -2) for value in values])


def _part_of_module(name: str) -> str:
    """Return "embedding", "layer 3" or "head" for the name of a module."""
    pieces = name.split(".")
    if "layers" in pieces:
        return f"layer {pieces[pieces.index('layers') + 1]}"
    return "embedding" if pieces[-1] == "embed_tokens" else "head"


class _Recorder(fx.Interpreter):
    """Runs a graph and records the float outputs of every node."""

    def __init__(self, module: fx.GraphModule, outputs: dict[str, list[Tensor]]) -> None:
        super().__init__(module)
        self._outputs = outputs

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op == "call_function" and has_float_rows(value):
            self._outputs.setdefault(node.name, []).append(value.detach())
        return value


def _run_program(
    program: Program, suspect: Build, case: Case, prompt: Tensor, earlier: Tensor
) -> tuple[Tensor, Values]:
    """Run a case; returns its logits and the outputs of every node of the program."""
    copy = copy_program(program)
    copy.bind(lambda name, weight: _constant_value(suspect.weights, name, weight))
    outputs: dict[str, list[Tensor]] = {}

    def forward(*inputs: Tensor) -> tuple[Any, ...]:
        results: Iterable[Any] = _Recorder(copy.module, outputs).run(*inputs)
        return tuple(results)

    stepper = TorchStepper(forward, program.config, suspect.request.context)
    logits, _ = run_case(stepper, case, prompt, earlier)
    return logits, outputs


def _constant_value(weights: PlannedWeights, name: str, weight: Weight) -> Tensor:
    """Return a constant; if its matrix is not quantized yet, the dequantized values of the plan."""
    if weight.part != "values":
        return weights.value(name, weight)
    return torch.cat([weights.dequantized(source) for source in weight.sources])
