"""Graphs that Vela compiled, in TOSA's reference model: make test-ethos-u."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lfmc.errors import UnsupportedError
from lfmc.parity.compare import Rung
from lfmc.targets.ethos_u.runtime import TOSA
from lfmc.targets.ethos_u.vgf import convert, require_converter
from lfmc.verification.readback import read_back
from tests.targets.lowering import Lowered
from tests.targets.matrix import assert_starts_over
from tests.targets.qualcomm.programs import eight_bit

Make = Callable[..., Lowered]
pytestmark = pytest.mark.skipif(
    find_spec("ethosu") is None, reason="Vela is not in this environment: make test-ethos-u"
)
PROGRAMS = [
    ("lfm2-conv-bias", "ethos-u85-256"),
    ("lfm2_moe-scaled", "ethos-u85-256"),
    ("lfm3-attention-bias", "ethos-u55-128"),
]


def lower_8_bit(lowered: Make, name: str, accelerator: str, activations: str = "int8") -> Lowered:
    options = {"accelerator": accelerator, "activations": activations, "chunk": "8"}
    build = lowered(name, eight_bit, "ethos-u", **options)
    return build


def codes_of(build: Lowered, name: str) -> bytes:
    """Return the int8 codes of a matrix in row-major order."""
    rows, columns = build.checkpoint.tensors[name].shape
    codes = build.weights.packed((name,)).signed_codes()[:, :columns].to(torch.int8)
    return codes.reshape(rows, columns).contiguous().numpy().tobytes()


def run_rungs(build: Lowered) -> tuple[Rung, ...]:
    return build.target.operator_parity(build.program, build.folder, build.artifact)


@pytest.mark.parametrize(("name", "accelerator"), PROGRAMS)
def test_int8_agrees_with_torch(lowered: Make, name: str, accelerator: str) -> None:
    """Every operator differs by at most one step and runs on the NPU; Vela's report is complete."""
    build = lower_8_bit(lowered, name, accelerator)
    same_graphs, operators, logits = run_rungs(build)
    assert same_graphs.passed, same_graphs
    assert operators.passed, operators
    assert logits.passed, logits
    assert len(operators.cases) > 20
    report = build.artifact.facts["vela"]
    for graph in ("decode", "prefill"):
        assert report[graph]["cycles"] >= report[graph]["npu_cycles"] > 0
        assert report[graph]["encoded_weights_nbytes"] > 100_000
    assert report["prefill"]["macs"] > 5 * report["decode"]["macs"]


@pytest.mark.parametrize("name", ["lfm2-conv-bias", "lfm3-attention-bias"])
def test_int16_agrees_with_torch(lowered: Make, name: str) -> None:
    same_graphs, operators = run_rungs(lower_8_bit(lowered, name, "ethos-u85-256", "int16"))
    assert same_graphs.passed, same_graphs
    assert operators.passed, operators


def test_the_graphs_contain_the_codes_of_the_plan(lowered: Make) -> None:
    """The TOSA that Vela compiled contains the codes that are read back."""
    build = lower_8_bit(lowered, "lfm2_moe-scaled", "ethos-u85-256")
    errors = read_back(build, build.folder, build.artifact)
    matrices = [row.name for row in build.plan.rows if row.format.startswith("int")]
    assert set(errors) == set(matrices)
    graphs = [(build.folder / TOSA.format(name)).read_bytes() for name in ("decode", "prefill")]
    for name in matrices:
        assert all(codes_of(build, name) in graph for graph in graphs), name


def test_vgf_contains_the_codes_of_the_plan(lowered: Make, tmp_path: Path) -> None:
    """Check the file of Arm's converter; nothing executes it."""
    converter, _ = require_converter()
    build = lower_8_bit(lowered, "lfm2_moe-scaled", "ethos-u85-256")
    convert(converter, build.folder / "decode.tosa", tmp_path / "decode.vgf")
    vgf = (tmp_path / "decode.vgf").read_bytes()
    assert vgf.startswith(b"VGF")
    for row in build.plan.rows:
        if row.format.startswith("int"):
            assert codes_of(build, row.name) in vgf, row.name


def test_a_conversation_starts_over(lowered: Make) -> None:
    build = lower_8_bit(lowered, "lfm3-attention-bias", "ethos-u55-128")
    assert_starts_over(build, 8)


def test_a_wrong_weight_fails_the_operator_rung(lowered: Make) -> None:
    build = lower_8_bit(lowered, "lfm3-attention-bias", "ethos-u55-128")
    with build.changed_constant("out_proj.scales", lambda scales: scales * 1.05):
        same_graphs, operators, _ = run_rungs(build)
    assert same_graphs.passed  # both graphs have the constants of the file
    assert not operators.passed
    worst = max(operators.cases, key=lambda case: case.difference)
    assert worst.case.startswith("linear_nbits")


def test_unsupported_operators_are_refused(lowered: Make) -> None:
    from lfmc.targets.ethos_u.accelerators import ACCELERATORS
    from lfmc.targets.ethos_u.compile import compile_graph
    from lfmc.targets.npu.qdq_pairs import QdqGraph

    class Sort(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.sort(x)[0],)

    example = (torch.zeros(1, 8),)
    module = torch.export.export(Sort(), example).module()
    with pytest.raises(UnsupportedError, match="does not support every operator"):
        compile_graph(QdqGraph(module, example, ()), ACCELERATORS["ethos-u85-256"])
