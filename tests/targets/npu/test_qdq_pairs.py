"""Graphs of quantize and dequantize pairs: what they compute, and where the pairs are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lfmc.targets.npu.bound_constants import Bound
from lfmc.targets.npu.bundle import HOST_FILE, steps_of
from lfmc.targets.npu.constants import read_matrix
from lfmc.targets.npu.forms import BY_TAPS, Forms
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX
from lfmc.targets.npu.qdq_pairs import DEQUANTIZE, DEQUANTIZE_ROWS, QUANTIZE, Coding, Pairs, paired
from lfmc.targets.npu.run_program import run_program
from lfmc.targets.npu.static_ranges import Step, rounding
from lfmc.targets.shared.parameters_file import open_parameters
from tests.targets.lowering import Choose, Lowered
from tests.targets.qualcomm.programs import both

Make = Callable[..., Lowered]
PROGRAMS = [("lfm2-conv-bias", both), ("lfm2_moe-scaled", both), ("lfm3-attention-bias", both)]
CODINGS = {
    "unsigned": Coding({8: torch.uint8, 16: torch.int32}, signed=False),
    "signed": Coding({8: torch.int8, 16: torch.int16}, signed=True),
}


def lowered_graph(made: Lowered, coding: Coding) -> tuple[Pairs, Interface, dict[str, Step]]:
    facts = open_parameters(made.folder, HOST_FILE)
    steps, interface = steps_of(facts), Interface.from_dict(facts.facts["interface"])
    own, held = interface.of_tokens(4), open_parameters(made.folder)
    return paired(made.program, own, steps, held, coding, BY_TAPS, probed=True), own, steps


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_they_round_as_torch_does(lowered: Make, name: str, choose: Choose, coding: Coding) -> None:
    """Every value that is kept, of the graph's own inputs: equal, or off by one step."""
    made = lowered(name, choose, "qualcomm", stage="edge", activations="int16", chunk="16")
    made.program.bind(made.weights.value)
    pairs, interface, steps = lowered_graph(made, coding)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        key: steps[key].rounded(torch.randn(shape, generator=generator))
        for key, shape in interface.inputs.items()
    } | dict(interface.tables(3))
    with torch.no_grad():
        found = pairs.module(*(inputs[key] for key in interface.inputs))[len(interface.outputs) :]
    values = iter(zip(pairs.kept, found, strict=True))

    class Taught(Forms):
        """Goes on with what the graph has."""

        def keep_next(self, value: torch.Tensor, own: str) -> torch.Tensor:
            if own.endswith(("weight", "bias", MATRIX)):
                return steps[own].rounded(value)
            kept, theirs = next(values)
            assert kept == own
            apart = (steps[own].codes(value) - steps[own].codes(theirs)).abs().max()
            assert float(apart) <= 1, own
            return theirs

    bound = Bound(made.program)
    forms = Taught(made.program, interface, bound, lambda v, n: forms.keep_next(v, n), BY_TAPS)
    run_program(forms, inputs)
    assert next(values, None) is None


def test_every_value_has_a_pair_and_every_matrix_its_codes(lowered: Make) -> None:
    made = lowered("lfm2_moe-scaled", both, "qualcomm", stage="edge", chunk="16")
    made.program.bind(made.weights.value)
    pairs, _, _ = lowered_graph(made, CODINGS["signed"])
    codes = set()
    for node in pairs.module.graph.nodes:
        if node.op != "call_function" or node.target in (QUANTIZE, DEQUANTIZE, DEQUANTIZE_ROWS):
            continue
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert {user.target for user in node.users} == {QUANTIZE}, node
        if "linear" in str(node.target):
            codes.add(node.args[1].args[0].target)
    held = open_parameters(made.folder)
    names = [row.name for row in made.plan.rows if row.format.startswith("int")]
    parameters = [p.data for p in pairs.module.parameters() if p.dtype == torch.int8]
    for name in set(names) - {"model.embed_tokens.weight"}:
        own, _ = read_matrix(held, name)
        assert any(p.shape == own.shape and torch.equal(p, own) for p in parameters), name
    assert len(codes) > 40


def test_rounding_of_a_step_and_a_pair_are_the_same() -> None:
    step, value = Step(0.01, 100, 8), torch.linspace(-2, 3, 200)
    for coding in CODINGS.values():
        assert torch.equal(coding.pair(value, step), rounding({"x": step})(value, "x"))
