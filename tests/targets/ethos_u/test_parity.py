"""Graphs that Vela compiled, by TOSA's reference model: make test-ethos-u."""

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


def made_of(lowered: Make, name: str, accelerator: str, activations: str = "int8") -> Lowered:
    options = {"accelerator": accelerator, "activations": activations, "chunk": "8"}
    made = lowered(name, eight_bit, "ethos-u", **options)
    made.program.bind(made.weights.value)
    return made


def codes_of(made: Lowered, name: str) -> bytes:
    """The codes of a matrix, row by row."""
    rows, columns = made.checkpoint.tensors[name].shape
    codes = made.weights.packed((name,)).signed_codes()[:, :columns].to(torch.int8)
    return codes.reshape(rows, columns).contiguous().numpy().tobytes()


def rungs(made: Lowered) -> tuple[Rung, ...]:
    return made.target.operator_parity(made.program, made.folder, made.artifact)


@pytest.mark.parametrize(("name", "accelerator"), PROGRAMS)
def test_8_bits(lowered: Make, name: str, accelerator: str) -> None:
    """Every operator equal or off by one step, all of it on the NPU, and what Vela tells."""
    made = made_of(lowered, name, accelerator)
    same, operators, together = rungs(made)
    assert same.passed, same
    assert operators.passed, operators
    assert together.passed, together
    assert len(operators.cases) > 20
    report = made.artifact.facts["vela"]
    for graph in ("decode", "prefill"):
        assert report[graph]["cycles"] >= report[graph]["npu_cycles"] > 0
        assert report[graph]["encoded_weights_nbytes"] > 100_000
    assert report["prefill"]["macs"] > 5 * report["decode"]["macs"]


@pytest.mark.parametrize("name", ["lfm2-conv-bias", "lfm3-attention-bias"])
def test_16_bits(lowered: Make, name: str) -> None:
    same, operators = rungs(made_of(lowered, name, "ethos-u85-256", "int16"))
    assert same.passed, same
    assert operators.passed, operators


def test_the_graphs_hold_the_plans_codes(lowered: Make) -> None:
    """Read back from the constants, which lie in what Vela was given, too."""
    made = made_of(lowered, "lfm2_moe-scaled", "ethos-u85-256")
    errors = read_back(made, made.folder, made.artifact)
    matrices = [row.name for row in made.plan.rows if row.format.startswith("int")]
    assert set(errors) == set(matrices)
    graphs = [(made.folder / TOSA.format(name)).read_bytes() for name in ("decode", "prefill")]
    for name in matrices:
        assert all(codes_of(made, name) in graph for graph in graphs), name


def test_vgf_holds_the_plans_codes(lowered: Make, tmp_path: Path) -> None:
    """As Arm's converter writes it; nothing executes it here."""
    converter, _ = require_converter()
    made = made_of(lowered, "lfm2_moe-scaled", "ethos-u85-256")
    convert(converter, made.folder / "decode.tosa", tmp_path / "decode.vgf")
    written = (tmp_path / "decode.vgf").read_bytes()
    assert written.startswith(b"VGF")
    for row in made.plan.rows:
        if row.format.startswith("int"):
            assert codes_of(made, row.name) in written, row.name


def test_it_starts_over(lowered: Make) -> None:
    made = made_of(lowered, "lfm3-attention-bias", "ethos-u55-128")
    assert_starts_over(made, 8)


def test_a_wrong_weight_is_found(lowered: Make) -> None:
    made = made_of(lowered, "lfm3-attention-bias", "ethos-u55-128")
    name = next(name for name in made.program.weights if name.endswith("out_proj.scales"))
    held = made.program.module.get_buffer(name)
    right = held.clone()
    try:
        held.mul_(1.05)
        same, operators, _ = rungs(made)
        assert same.passed  # constants are the file's in both
        assert not operators.passed
        worst = max(operators.cases, key=lambda case: case.difference)
        assert worst.case.startswith("linear_nbits")
    finally:
        held.copy_(right)


def test_what_the_npu_does_not_take_is_refused(lowered: Make) -> None:
    from lfmc.targets.ethos_u.accelerators import ACCELERATORS
    from lfmc.targets.ethos_u.compile import compile_graph
    from lfmc.targets.npu.qdq_pairs import Pairs

    class Sorted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.sort(x)[0],)

    example = (torch.zeros(1, 8),)
    module = torch.export.export(Sorted(), example).module()
    with pytest.raises(UnsupportedError, match="does not take every operator"):
        compile_graph(Pairs(module, example, ()), ACCELERATORS["ethos-u85-256"])
