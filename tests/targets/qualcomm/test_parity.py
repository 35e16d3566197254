"""Models for QNN: as ONNX has them on a CPU, and, where QNN is, compiled and emulated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError, InputError, UnsupportedError
from lfmc.parity.compare import Rung
from lfmc.run.stepper import TorchStepper
from lfmc.targets.base import Request
from lfmc.targets.npu.bundle import embedding
from lfmc.targets.qualcomm import session
from lfmc.targets.qualcomm.runtime import SOURCE
from lfmc.targets.shared.parameters_file import PARAMETERS
from lfmc.verification.readback import read_back
from tests.conftest import TRAINED
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered, lower
from tests.targets.matrix import assert_context_ends, assert_starts_over
from tests.targets.qualcomm.programs import both, eight_bit, four_bit_rows, halves

Make = Callable[..., Lowered]
PROGRAMS = [("lfm2-conv-bias", both), ("lfm2_moe-scaled", both), ("lfm3-attention-bias", both)]
needs_qnn = pytest.mark.skipif(
    not session.has_qnn(), reason="QNN is not installed: make test-qualcomm"
)


def rungs(made: Lowered) -> tuple[Rung, ...]:
    made.program.bind(made.weights.value)
    return made.target.operator_parity(made.program, made.folder, made.artifact)


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_as_onnx(lowered: Make, name: str, choose: Choose, activations: str) -> None:
    """Every operator to one step of its own inputs, and all of them together."""
    made = lowered(name, choose, "qualcomm", stage="edge", activations=activations, chunk="16")
    assert made.artifact.facts["operators"]["MatMul"] > 20
    assert made.artifact.facts["not_known_to_qnn"] == []
    operators, together = rungs(made)
    assert operators.passed, operators
    assert together.passed, together
    assert {"linear_nbits.product#", "attention.scores", "conv_#"} <= {
        case.case for case in operators.cases
    }


@pytest.mark.parametrize("choose", [eight_bit, four_bit_rows, halves])
@pytest.mark.parametrize("name", ["lfm2_moe", "lfm2-untied"])
def test_embedding(lowered: Make, name: str, choose: Choose) -> None:
    """Rows of a table, or columns of a head that shares it."""
    activations = "float16" if choose is halves else "int16"
    made = lowered(name, choose, "qualcomm", stage="edge", activations=activations, chunk="16")
    own = "model.embed_tokens.weight"
    table, ids = made.weights.dequantized(own), torch.tensor([0, 1, 8191, 5, 4000])
    assert torch.equal(embedding(made.folder)(ids), table[ids])


def test_floats_as_onnx(lowered: Make) -> None:
    """On a CPU, float16 constants are computed with in float32: nothing is rounded."""
    made = lowered("lfm2-untied", halves, "qualcomm", stage="edge", activations="float16")
    tokens = random_tokens(made.checkpoint.config, 1, 75)[0]
    found = made.target.run(made.folder).step(tokens)
    made.program.bind(made.weights.value)
    plain = TorchStepper(made.program.module, made.checkpoint.config, made.asked.context)
    expected = plain.step(tokens)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@needs_qnn
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
@pytest.mark.parametrize("soc", ["sm8750", "sm8650"])
def test_by_qnn(lowered: Make, name: str, choose: Choose, soc: str) -> None:
    made = lowered(name, choose, "qualcomm", soc=soc, chunk="16")
    (operators,) = rungs(made)
    assert operators.passed, operators
    assert {"decode.onnx", "prefill.onnx"} < set(made.artifact.beside)


@needs_qnn
@pytest.mark.parametrize("name", ["lfm2-untied", "lfm2_moe", "lfm3"])
def test_floats_by_qnn(lowered: Make, name: str) -> None:
    made = lowered(name, halves, "qualcomm", activations="float16", chunk="16")
    (together,) = rungs(made)
    assert together.passed, together


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, name: str
) -> None:
    made = lower(any_checkpoint(name), both, tmp_path, name="qualcomm", options={"chunk": "16"})
    (operators,) = rungs(made)
    assert operators.passed, operators


@needs_qnn
def test_qnn_prints_nothing(lowered: Make) -> None:
    """Standard output is for results, `--json` among them."""
    made = lowered("lfm3-attention-bias", both, "qualcomm", chunk="16")
    code = f"""
from pathlib import Path
from lfmc.targets.base import get_target
print(get_target("qualcomm").run(Path({str(made.folder)!r})).step([1, 2, 3]).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


@needs_qnn
def test_qnn_starts_over(lowered: Make) -> None:
    made = lowered("lfm3-attention-bias", both, "qualcomm", chunk="16")
    assert_starts_over(made, 16)


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_constants_on_disk_are_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "qualcomm", stage="edge", activations="int16", chunk="16")
    errors = read_back(made, made.folder, made.artifact)
    assert set(errors) == {row.name for row in made.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in made.artifact.tensors)
    assert stored == sum(row.nbytes for row in made.plan.rows)


@pytest.mark.parametrize("part", ["scales", "codes"])
def test_a_wrong_weight_is_found(lowered: Make, part: str) -> None:
    """One matrix in torch: its scales 2 % off, or its rows moved by one."""
    made = lowered("lfm3-attention-bias", both, "qualcomm", stage="edge", chunk="16")
    made.program.bind(made.weights.value)
    name = next(name for name in made.program.weights if name.endswith(f"out_proj.{part}"))
    held = made.program.module.get_buffer(name)
    right = held.clone()
    try:
        held.copy_(held * 1.02 if part == "scales" else held.roll(1, 0))
        operators, _ = made.target.operator_parity(made.program, made.folder, made.artifact)
        assert not operators.passed
        worst = max(operators.cases, key=lambda case: case.difference)
        assert worst.case.startswith("linear_nbits")
    finally:
        held.copy_(right)


def test_a_changed_file_is_found(lowered: Make, tmp_path: Path) -> None:
    made = lowered("lfm3-attention-bias", both, "qualcomm", stage="edge", chunk="16")
    path = made.folder / PARAMETERS
    data = path.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0x10
    try:
        path.write_bytes(changed)
        with pytest.raises(GateError, match="on disk are not the plan's"):
            read_back(made, made.folder, made.artifact)
    finally:
        path.write_bytes(data)


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    made = lowered("lfm2-untied", halves, "qualcomm", stage="edge", activations="float16")
    made.program.bind(made.weights.value)
    assert_context_ends(made)


def test_what_is_missing_is_told(
    lowered: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lowered("lfm3-attention-bias", both, "qualcomm", stage="edge", chunk="16")
    path = made.folder / SOURCE.format("decode")
    data = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(InputError, match="there is no model"):
            made.target.run(made.folder)
    finally:
        path.write_bytes(data)
    monkeypatch.setattr(session, "has_qnn", lambda: False)
    asked = {**made.asked.options, "stage": "context"}
    with pytest.raises(UnsupportedError, match="onnxruntime-qnn"):
        made.target.check(made.checkpoint.config, Request(96, asked))
    reason = made.target.why_not_here(Request(96, asked))
    assert reason is not None
    assert "onnxruntime-qnn" in reason
    assert made.target.why_not_here(made.asked) is None


def test_floats_and_n_bit_weights_do_not_mix(
    lowered: Make, any_checkpoint: Callable[[str], object]
) -> None:
    with pytest.raises(UnsupportedError, match="float16 weights only"):
        lowered("lfm2-untied", eight_bit, "qualcomm", stage="edge", activations="float16")
