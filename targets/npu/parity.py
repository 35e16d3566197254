"""Compare an artifact with its graphs in torch, where every value is rounded as in the artifact."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from lfmc.errors import GateError
from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung, compare_logits
from lfmc.run.conversation import ConversationModel, SteppedModel
from lfmc.run.stepper import TorchStepper
from lfmc.targets.npu.bound_constants import BoundConstants
from lfmc.targets.npu.bundle import HOST_FILE, read_steps, read_style
from lfmc.targets.npu.forms import Forms
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.reference import RoundedReference
from lfmc.targets.npu.run_program import run_program
from lfmc.targets.npu.static_ranges import Step, round_to_steps, torch_stepper
from lfmc.targets.shared.parameters_file import Parameters, open_parameters

TITLE = "every operator = torch on the artifact's inputs, relative to tolerance"
# If an artifact does not expose its inner values, its graph is compiled again with them as outputs.
# Rung 3 then also checks that this graph returns the same results as the artifact's.
SAME_GRAPHS_TITLE = "the artifact's graphs = the graphs whose operators are compared"
CONSTANTS = "constants"
BEFORE = 21  # tokens of the conversation before the call that is compared

# Names and values of the rounded values of the artifact's graph, in order, for an interface and its
# inputs by name. Constants and inputs may be missing.
NamedValues = Iterable[tuple[str, Tensor]]
Probe = Callable[[Interface, Mapping[str, Tensor]], NamedValues]


def make_reference(program: Program, folder: Path) -> ConversationModel:
    """Return the program's graphs in torch, with the steps of the artifact in `folder`."""
    host_file = open_parameters(folder, HOST_FILE)
    steps, interface = read_steps(host_file), _check_interface(program, host_file)
    round_value = round_to_steps(steps) if steps else _round_to_float16
    constants = BoundConstants(program)
    embed = constants.embedding(host_file.facts["embedding"])
    style = read_style(host_file)
    module = RoundedReference(program, interface, constants, embed, round_value, style)
    return SteppedModel(TorchStepper(module, program.config, interface.context))


def _check_interface(program: Program, host_file: Parameters) -> Interface:
    """Return the interface of the program; raise `GateError` if the artifact's is another."""
    actual = Interface.from_dict(host_file.facts["interface"])
    expected = Interface.from_config(program.config, actual.context, actual.tokens)
    wrong = [
        field.name
        for field in fields(Interface)
        if getattr(actual, field.name) != getattr(expected, field.name)
    ]
    if wrong:
        raise GateError(
            "the artifact's facts for its host are not those of the model",
            where=f"{HOST_FILE}: interface, {wrong[0]}",
            expected=getattr(expected, wrong[0]),
            got=getattr(actual, wrong[0]),
            todo="this artifact is wrong; please report it",
        )
    return expected


def _round_to_float16(value: Tensor, name: str) -> Tensor:
    return value.half().float()


def operators_rung(
    program: Program, folder: Path, probe: Probe, tolerance: Callable[[str, Step], float]
) -> Rung:
    """Compare each operator of the artifact with torch, on the artifact's own inputs.

    Each case is a kind of operator: its largest difference in steps, relative to its tolerance.
    """
    host_file = open_parameters(folder, HOST_FILE)
    steps, facts, style = read_steps(host_file), host_file.facts, read_style(host_file)
    interface = _check_interface(program, host_file)
    differences: dict[str, float] = defaultdict(float)
    failures: list[CaseResult] = []
    constants = BoundConstants(program)
    embed, lengths = constants.embedding(facts["embedding"]), facts["lengths"]
    for length in lengths:
        generator = torch.Generator().manual_seed(0)
        count = min(BEFORE, interface.context - length)
        ids = torch.randint(interface.vocab_size, (count + length,), generator=generator)
        round_value = round_to_steps(steps)
        host = torch_stepper(program, interface, lengths, constants, embed, round_value, style)
        host.step(ids[:count])
        inputs, call_interface = host.inputs(ids[count:], length), interface.with_tokens(length)
        values = probe(call_interface, inputs)
        comparison = _TeacherForcing(
            steps, values, set(call_interface.inputs), differences, failures, tolerance
        )
        with torch.no_grad():
            forms = Forms(program, call_interface, constants, comparison.compare, style)
            run_program(forms, inputs)
        comparison.finish()
    cases = tuple(CaseResult(kind, worst, 1.0) for kind, worst in sorted(differences.items()))
    return Rung(3, TITLE, 1.0, cases, first=next(iter(failures), None))


def compare_outputs(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> CaseResult:
    """Compare the outputs of two graphs for the same inputs; return the worst output."""
    results = [
        compare_logits(name, a.float(), e.float()) for a, e in zip(actual, expected, strict=True)
    ]
    return max(results, key=lambda case: case.difference)


class _TeacherForcing:
    """Compare each value with the artifact's, and continue with the artifact's value."""

    def __init__(
        self,
        steps: Mapping[str, Step],
        values: NamedValues,
        inputs: Set[str],
        differences: dict[str, float],
        failures: list[CaseResult],
        tolerance: Callable[[str, Step], float],
    ) -> None:
        self._steps, self._inputs, self._tolerance = steps, inputs, tolerance
        self._differences, self._failures = differences, failures
        self._values = iter(values)
        self._next = next(self._values, None)

    def compare(self, value: Tensor, name: str) -> Tensor:
        step, kind = self._steps[name], kind_of(name)
        if self._next is None or self._next[0] != name:
            if kind != CONSTANTS and name not in self._inputs:
                raise GateError("the artifact's graph lacks a value of the program", where=name)
            return step.round(value)
        actual = self._next[1].reshape(value.shape)
        self._next = next(self._values, None)
        difference = float((step.codes(value) - step.codes(actual)).abs().max())
        difference /= self._tolerance(name, step)
        self._differences[kind] = max(self._differences[kind], difference)
        if not difference <= 1.0:
            self._failures.append(CaseResult(name, difference, 0.0))
        return actual

    def finish(self) -> None:
        if self._next is not None:
            raise GateError(
                "the artifact's graph has a value that the program lacks", where=self._next[0]
            )


def kind_of(name: str) -> str:
    """Return a value's name without the numbers of its layer and operator."""
    if re.search(r"(weight|bias)(#matrix)?$", name):
        return CONSTANTS
    return re.sub(r"\d+", "#", re.sub(r"_default(_\d+)?", "", name))
