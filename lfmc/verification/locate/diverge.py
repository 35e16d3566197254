"""Finds where two torch models diverge: decoder and transformers, or two states of a graph."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
from lfmc.model import build_decoder
from lfmc.parity.compare import FLOAT_TOLERANCE, Case, draw_tokens
from lfmc.parity.place import Place, find_mismatch
from lfmc.passes.base import apply
from lfmc.passes.pipeline import pipeline
from lfmc.reference.layerwise_decoder import LayerwiseDecoder
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.reference.module_outputs import Outputs, has_float_rows
from lfmc.reference.transformers_model import LayerwiseTransformers
from lfmc.run.conversation import Conversation
from lfmc.verification.locate.cut import parts_by_node, producing_node, source_tensors

_TOWER = "language_model."  # prefix of the decoder's modules in a vision-language model


def find_in_decoder(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Return the first module of the decoder whose output differs from transformers (rung 1)."""
    checkpoint = suspect.checkpoint
    config = checkpoint.config
    progress.step("modules of both models")
    conversation = case.conversation(*draw_tokens(case.length, config.vocab_size))
    actual: Outputs = {}
    expected: Outputs = {}
    LayerwiseDecoder(config, checkpoint.weights, case.length, module_outputs=actual).run(
        [conversation]
    )
    LayerwiseTransformers(checkpoint, module_outputs=expected).run([conversation])
    expected = {name.replace(_TOWER, ""): values for name, values in expected.items()}
    place = _find_first_mismatch(1, actual, expected, case)
    if place is None:
        return None
    kind = type(build_decoder(config).get_submodule(place.name)).__name__
    return replace(place, part=_part_of_module(place.name), operator=kind)


def find_in_passes(suspect: Build, case: Case, progress: Progress) -> Place | None:
    """Return the first wrong node after the first pass that changes the logits (rung 2)."""
    checkpoint, weights, request = suspect.checkpoint, suspect.weights, suspect.request
    config = checkpoint.config
    conversation = case.conversation(*draw_tokens(case.length, config.vocab_size))
    decoder = LayerwiseDecoder(config, weights.dequantized_tensors, request.context)
    (expected,) = decoder.run([conversation])
    program = trace(config, suspect.target.trace_spec(config, request))
    program.bind(partial(_constant_value, weights))
    formats = {row.name: parse_format(row.format) for row in weights.plan.rows}
    before: Outputs | None = None
    for name, step in [("trace", None), *((step.name, step) for step in pipeline(formats))]:
        progress.step(name)
        if step is not None:
            apply([step], program)
        logits, after = _run_program(program, request.context, conversation)
        mismatch = find_mismatch(logits, expected.logits, FLOAT_TOLERANCE)
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


def _place_in_graph(place: Place, program: Program, before: Outputs) -> Place:
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


def _find_first_mismatch(rung: int, actual: Outputs, expected: Outputs, case: Case) -> Place | None:
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
        token = mismatch.row * case.length // len(actual_rows)
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


def _run_program(
    program: Program, context: int, conversation: Conversation
) -> tuple[Tensor, Outputs]:
    """Run a conversation; returns its logits and the outputs of every node of the program."""
    outputs: Outputs = {}

    def record(node: fx.Node, value: Any, conversation_number: int, call_number: int) -> None:
        if has_float_rows(value):
            outputs.setdefault(node.name, []).append(value)

    (reply,) = LayerwiseProgram(program, context, observe=record).run([conversation])
    return reply.logits, outputs


def _constant_value(weights: PlannedWeights, name: str, weight: Weight) -> Tensor:
    """Return a constant; if its matrix is not quantized yet, the dequantized values of the plan."""
    if weight.part != "values":
        return weights.value(name, weight)
    return torch.cat([weights.dequantized(source) for source in weight.sources])
