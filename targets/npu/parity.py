"""What an artifact is held against: the graphs in torch, every value rounded as they round it."""

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
from lfmc.parity.compare import CaseResult, Rung, difference
from lfmc.targets.npu.bound_constants import Bound
from lfmc.targets.npu.bundle import HOST_FILE, steps_of, style_of
from lfmc.targets.npu.forms import Forms
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.reference import Rounded
from lfmc.targets.npu.run_program import run_program
from lfmc.targets.npu.static_ranges import Step, rounding, torch_stepper
from lfmc.targets.shared.parameters_file import Parameters, open_parameters

TITLE = "every operator = torch, on the artifact's own inputs, over what is allowed"
# Where an artifact shows nothing of what is inside, its graph is made again so that it does: the
# same one, if it gives what the artifact's gives.
SAME = "the artifact's graphs = those whose operators are compared"
CONSTANTS = "constants"
BEFORE = 21  # tokens of a conversation that an operator's inputs come from

# Of an interface and inputs by name: names and values of what the artifact's graph keeps, in order.
# Constants and inputs may be missing.
Kept = Iterable[tuple[str, Tensor]]
Probe = Callable[[Interface, Mapping[str, Tensor]], Kept]


def reference(program: Program, folder: Path) -> Rounded:
    """The program's graphs with the steps of the artifact in `folder`."""
    held = open_parameters(folder, HOST_FILE)
    steps, interface = steps_of(held), _interface(program, held)
    keep, bound = rounding(steps) if steps else _half, Bound(program)
    embed = bound.embed(held.facts["embedding"])
    return Rounded(program, interface, bound, embed, keep, style_of(held))


def _interface(program: Program, held: Parameters) -> Interface:
    """The program's own, and `GateError` for an artifact that tells its host another."""
    told = Interface.from_dict(held.facts["interface"])
    right = Interface.of(program.config, told.context, told.tokens)
    wrong = [
        own.name for own in fields(Interface) if getattr(told, own.name) != getattr(right, own.name)
    ]
    if wrong:
        raise GateError(
            "what the artifact tells its host is not the model's",
            where=f"{HOST_FILE}: interface, {wrong[0]}",
            expected=getattr(right, wrong[0]),
            got=getattr(told, wrong[0]),
            todo="this artifact is wrong; please report it",
        )
    return right


def _half(value: Tensor, name: str) -> Tensor:
    """What float16 makes of a value."""
    return value.half().float()


def operators_rung(
    program: Program, folder: Path, probe: Probe, allowed: Callable[[str, Step], float]
) -> Rung:
    """Each operator's result in torch, of inputs as the artifact has them, against the artifact's:
    the largest difference of a kind of operator in steps, over what is allowed."""
    held = open_parameters(folder, HOST_FILE)
    steps, facts, style = steps_of(held), held.facts, style_of(held)
    interface = _interface(program, held)
    found: dict[str, float] = defaultdict(float)
    firsts: list[CaseResult] = []
    bound = Bound(program)
    embed, lengths = bound.embed(facts["embedding"]), facts["lengths"]
    for length in lengths:
        generator = torch.Generator().manual_seed(0)
        count = min(BEFORE, interface.context - length)
        ids = torch.randint(interface.vocab_size, (count + length,), generator=generator)
        keep = rounding(steps)
        host = torch_stepper(program, interface, lengths, bound, embed, keep, style)
        host.step(ids[:count])
        inputs, own = host.inputs(ids[count:], length), interface.of_tokens(length)
        kept = probe(own, inputs)
        teacher = _Teacher(steps, kept, set(own.inputs), found, firsts, allowed)
        with torch.no_grad():
            run_program(Forms(program, own, bound, teacher.keep, style), inputs)
        teacher.ended()
    cases = tuple(CaseResult(kind, worst, 1.0) for kind, worst in sorted(found.items()))
    return Rung(3, TITLE, 1.0, cases, first=next(iter(firsts), None))


def same_outputs(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> CaseResult:
    """Of the outputs of two graphs for the same inputs those that differ most."""
    found = [difference(name, a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    return max(found, key=lambda case: case.difference)


class _Teacher:
    """Compares what is kept with the artifact's, and goes on with that."""

    def __init__(
        self,
        steps: Mapping[str, Step],
        kept: Kept,
        inputs: Set[str],
        found: dict[str, float],
        beyond: list[CaseResult],
        allowed: Callable[[str, Step], float],
    ) -> None:
        self._steps, self._inputs, self._found, self._allowed = steps, inputs, found, allowed
        self._beyond = beyond
        self._kept = iter(kept)
        self._next = next(self._kept, None)

    def keep(self, value: Tensor, name: str) -> Tensor:
        step, kind = self._steps[name], kind_of(name)
        if self._next is None or self._next[0] != name:
            if kind != CONSTANTS and name not in self._inputs:
                raise GateError("the artifact's graph does not keep a value", where=name)
            return step.rounded(value)
        theirs = self._next[1].reshape(value.shape)
        self._next = next(self._kept, None)
        apart = float((step.codes(value) - step.codes(theirs)).abs().max())
        apart /= self._allowed(name, step)
        self._found[kind] = max(self._found[kind], apart)
        if not apart <= 1.0:
            self._beyond.append(CaseResult(name, apart, 0.0))
        return theirs

    def ended(self) -> None:
        if self._next is not None:
            raise GateError("the artifact's graph keeps what torch does not", where=self._next[0])


def kind_of(name: str) -> str:
    """A value's name without what numbers it."""
    if re.search(r"(weight|bias)(#matrix)?$", name):
        return CONSTANTS
    return re.sub(r"\d+", "#", re.sub(r"_default(_\d+)?", "", name))
