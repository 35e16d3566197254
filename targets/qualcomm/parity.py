"""What the artifact is held against: the graphs in torch, every value rounded as they round it."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from lfmc.parity import CaseResult, Rung
from lfmc.program import Program
from lfmc.targets.npu.bound import Bound
from lfmc.targets.npu.forms import Forms
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.pairs import paired
from lfmc.targets.npu.reference import Rounded
from lfmc.targets.npu.steps import Step, rounding, torch_stepper
from lfmc.targets.parameters import PARAMETERS, open_parameters
from lfmc.targets.qualcomm.delegate import CODING, compile_graph, open_pte
from lfmc.targets.qualcomm.qdq import kept_name, probed
from lfmc.targets.qualcomm.runtime import COMPILED, HOST_FILE, SOURCE, graph_name, steps_of
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS

TITLE = "every operator = torch, on the artifact's own inputs, over what is allowed"
# Steps of a result that an operator may be off by. On a CPU, one. QNN rounds in places of its own:
# of 65536 steps twice what was measured (docs/qualcomm.md), of 256 two.
EDGE = 1.0
ALLOWED = {16: 128.0, 8: 2.0}
CONSTANTS = "constants"
BEFORE = 21  # tokens of a conversation that an operator's inputs come from


def reference(program: Program, folder: Path) -> Rounded:
    """The program's graphs with the steps of the artifact in `folder`."""
    held = open_parameters(folder, HOST_FILE)
    steps, interface = steps_of(held), Interface.from_dict(held.facts["interface"])
    keep, bound = rounding(steps) if steps else _half, Bound(program)
    return Rounded(program, interface, bound, bound.embed(held.facts["embedding"]), keep)


def _half(value: Tensor, name: str) -> Tensor:
    """What float16 makes of a value."""
    return value.half().float()


def operators_rung(program: Program, folder: Path) -> Rung:
    """Each operator's result in torch, of inputs as the artifact has them, against the artifact's:
    the largest difference of a kind of operator, over what it may be."""
    held = open_parameters(folder, HOST_FILE)
    steps, facts = steps_of(held), held.facts
    interface = Interface.from_dict(facts["interface"])
    found: dict[str, float] = defaultdict(float)
    bound = Bound(program)
    for length in facts["lengths"]:
        made, inputs = _call(program, bound, folder, length)
        teacher = _Teacher(steps, facts["kept"], made, found, edge=facts["stage"] == "edge")
        own = interface.of_tokens(length)
        with torch.no_grad():
            Forms(program, own, bound, teacher.keep, by_taps=True).run(inputs)
    cases = tuple(CaseResult(kind, worst, 1.0) for kind, worst in sorted(found.items()))
    return Rung(3, TITLE, 1.0, cases)


def _call(
    program: Program, bound: Bound, folder: Path, length: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the artifact's graph of a length keeps amid a conversation, and its inputs."""
    held = open_parameters(folder, HOST_FILE)
    facts, steps = held.facts, steps_of(held)
    interface = Interface.from_dict(facts["interface"])
    generator = torch.Generator().manual_seed(0)
    count = min(BEFORE, interface.context - length)
    ids = torch.randint(interface.vocab_size, (count + length,), generator=generator)
    lengths, embed = facts["lengths"], bound.embed(facts["embedding"])
    host = torch_stepper(program, interface, lengths, bound, embed, rounding(steps))
    host.step(ids[:count])
    inputs = host.inputs(ids[count:], length)
    compiled = facts["stage"] == "context"
    if compiled and facts["runtime"] == "executorch":
        return _call_pte(program, folder, interface.of_tokens(length), inputs), inputs
    source = folder / SOURCE.format(graph_name(length))
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / PARAMETERS, place)  # ONNX Runtime takes no link
        path = Path(place) / source.name
        ir.save(probed(source, len(facts["kept"])), path)
        session = open_session(path, SOCS[facts["soc"]] if compiled else None)
        made = run(session, inputs)
    # The last value that a graph keeps is an output, and has its name.
    made.setdefault(kept_name(len(facts["kept"]) - 1), made["logits"])
    return made, inputs


def _call_pte(
    program: Program, folder: Path, interface: Interface, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same of what ExecuTorch compiles, but for constants, which no delegate gives."""
    facts = open_parameters(folder, HOST_FILE).facts
    steps = steps_of(open_parameters(folder, HOST_FILE))
    pairs = paired(program, interface, steps, open_parameters(folder), CODING, probed=True)
    places = [kept_name(i) for i, name in enumerate(facts["kept"]) if _kind(name) != CONSTANTS]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / COMPILED["executorch"].format("probed")
        compile_graph(pairs, SOCS[facts["soc"]], path, halves=False)
        names = [*interface.outputs, *places]
        return open_pte(path, list(interface.inputs), names)(inputs)


class _Teacher:
    """Compares what is kept with the artifact's, and goes on with that."""

    def __init__(
        self,
        steps: dict[str, Step],
        names: list[str],
        made: dict[str, Tensor],
        found: dict[str, float],
        *,
        edge: bool,
    ) -> None:
        self._steps, self._names, self._made, self._found = steps, names, made, found
        self._edge = edge
        self._index = 0

    def keep(self, value: Tensor, name: str) -> Tensor:
        index, self._index = self._index, self._index + 1
        assert self._names[index] == name
        step = self._steps[name]
        if _kind(name) == CONSTANTS and kept_name(index) not in self._made:
            return step.rounded(value)
        theirs = self._made[kept_name(index)]
        apart = float((step.codes(value) - step.codes(theirs)).abs().max())
        kind = _kind(name)
        allowed = EDGE if self._edge else ALLOWED[step.bits]
        self._found[kind] = max(self._found[kind], apart / allowed)
        return theirs


def _kind(name: str) -> str:
    """A value's name without what numbers it."""
    if re.search(r"(weight|bias)(#matrix)?$", name):
        return CONSTANTS
    return re.sub(r"\d+", "#", re.sub(r"_default(_\d+)?", "", name))
