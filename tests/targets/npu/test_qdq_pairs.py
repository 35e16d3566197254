"""Graphs of quantize and dequantize pairs: their results, and the positions of the pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lfmc.targets.npu.bound_constants import BoundConstants
from lfmc.targets.npu.bundle import HOST_FILE, read_steps
from lfmc.targets.npu.constants import read_matrix
from lfmc.targets.npu.forms import BY_TAPS, Forms
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX
from lfmc.targets.npu.qdq_pairs import (
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    QUANTIZE,
    Coding,
    QdqGraph,
    build_qdq_graph,
)
from lfmc.targets.npu.run_program import run_program
from lfmc.targets.npu.static_ranges import Step, round_to_steps
from lfmc.targets.shared.parameters_file import open_parameters
from tests.targets.lowering import Choose, Lowered
from tests.targets.qualcomm.programs import mixed_bits

Make = Callable[..., Lowered]
PROGRAMS = [
    ("lfm2-conv-bias", mixed_bits),
    ("lfm2_moe-scaled", mixed_bits),
    ("lfm3-attention-bias", mixed_bits),
]
CODINGS = {
    "unsigned": Coding({8: torch.uint8, 16: torch.int32}, signed=False),
    "signed": Coding({8: torch.int8, 16: torch.int16}, signed=True),
}


def lowered_graph(build: Lowered, coding: Coding) -> tuple[QdqGraph, Interface, dict[str, Step]]:
    host_file = open_parameters(build.folder, HOST_FILE)
    steps = read_steps(host_file)
    interface = Interface.from_dict(host_file.facts["interface"]).with_tokens(4)
    file = open_parameters(build.folder)
    graph = build_qdq_graph(
        build.program, interface, steps, file, coding, BY_TAPS, expose_values=True
    )
    return graph, interface, steps


def _cases() -> list[Any]:
    """Every program with every coding; one program for each coding runs without --slow."""
    quick = {("lfm2_moe-scaled", "unsigned"), ("lfm3-attention-bias", "signed")}
    return [
        pytest.param(
            name,
            choose,
            CODINGS[coding],
            id=f"{name}-{coding}",
            marks=() if (name, coding) in quick else pytest.mark.slow,
        )
        for name, choose in PROGRAMS
        for coding in CODINGS
    ]


@pytest.mark.parametrize(("name", "choose", "coding"), _cases())
def test_every_value_agrees_with_torch_to_one_step(
    lowered: Make, name: str, choose: Choose, coding: Coding
) -> None:
    """Torch computes each value from the graph's own inputs of that operator."""
    build = lowered(name, choose, "qualcomm", stage="edge", activations="int16", chunk="16")
    graph, interface, steps = lowered_graph(build, coding)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        key: steps[key].round(torch.randn(shape, generator=generator))
        for key, shape in interface.inputs.items()
    } | dict(interface.tables(3))
    with torch.no_grad():
        results = graph.module(*(inputs[key] for key in interface.inputs))
    values = iter(zip(graph.value_names, results[len(interface.outputs) :], strict=True))

    def compare_and_replace(value: torch.Tensor, name: str) -> torch.Tensor:
        """Compare a value with the graph's, and continue with the graph's value."""
        if name.endswith(("weight", "bias", MATRIX)):
            return steps[name].round(value)
        next_name, actual = next(values)
        assert next_name == name
        difference = (steps[name].codes(value) - steps[name].codes(actual)).abs().max()
        assert float(difference) <= 1, name
        return actual

    constants = BoundConstants(build.program)
    forms = Forms(build.program, interface, constants, compare_and_replace, BY_TAPS)
    run_program(forms, inputs)
    assert next(values, None) is None


def test_every_value_has_a_pair_and_every_matrix_its_codes(lowered: Make) -> None:
    build = lowered("lfm2_moe-scaled", mixed_bits, "qualcomm", stage="edge", chunk="16")
    graph, _, _ = lowered_graph(build, CODINGS["signed"])
    codes = set()
    for node in graph.module.graph.nodes:
        if node.op != "call_function" or node.target in (QUANTIZE, DEQUANTIZE, DEQUANTIZE_ROWS):
            continue
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert {user.target for user in node.users} == {QUANTIZE}, node
        if "linear" in str(node.target):
            codes.add(node.args[1].args[0].target)
    file = open_parameters(build.folder)
    names = [row.name for row in build.plan.rows if row.format.startswith("int")]
    parameters = [p.data for p in graph.module.parameters() if p.dtype == torch.int8]
    for name in set(names) - {"model.embed_tokens.weight"}:
        matrix, _ = read_matrix(file, name)
        assert any(p.shape == matrix.shape and torch.equal(p, matrix) for p in parameters), name
    assert len(codes) > 40


def test_a_pair_rounds_as_its_step_does() -> None:
    step, value = Step(0.01, 100, 8), torch.linspace(-2, 3, 200)
    for coding in CODINGS.values():
        assert torch.equal(coding.pair(value, step), round_to_steps({"x": step})(value, "x"))
