"""Models for QNN agree with torch: as ONNX on a CPU, and compiled and emulated if QNN is here."""

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
from lfmc.targets.npu.bundle import open_embedding
from lfmc.targets.qualcomm import session
from lfmc.targets.qualcomm.runtime import SOURCE
from lfmc.targets.shared.parameters_file import PARAMETERS
from lfmc.verification.readback import read_back
from tests.conftest import TRAINED
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered, lower
from tests.targets.matrix import assert_context_ends, assert_starts_over
from tests.targets.qualcomm.programs import eight_bit, float16, four_bit_rows, mixed_bits

Make = Callable[..., Lowered]
PROGRAMS = [
    ("lfm2-conv-bias", mixed_bits),
    ("lfm2_moe-scaled", mixed_bits),
    ("lfm3-attention-bias", mixed_bits),
]
needs_qnn = pytest.mark.skipif(
    not session.has_qnn(), reason="QNN is not installed: make test-qualcomm"
)


def run_rungs(build: Lowered) -> tuple[Rung, ...]:
    return build.target.operator_parity(build.program, build.folder, build.artifact)


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_onnx_agrees_with_torch(lowered: Make, name: str, choose: Choose, activations: str) -> None:
    """Compare every operator on its own inputs, to one step, and the logits."""
    build = lowered(name, choose, "qualcomm", stage="edge", activations=activations, chunk="16")
    assert build.artifact.facts["operators"]["MatMul"] > 20
    assert build.artifact.facts["not_known_to_qnn"] == []
    operators, logits = run_rungs(build)
    assert operators.passed, operators
    assert logits.passed, logits
    assert {"linear_nbits.product#", "attention.scores", "conv_#"} <= {
        case.case for case in operators.cases
    }


@pytest.mark.parametrize("choose", [eight_bit, four_bit_rows, float16])
@pytest.mark.parametrize("name", ["lfm2_moe", "lfm2-untied"])
def test_embeddings_are_those_of_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    """The host reads rows of a table, or columns of a head that shares the table."""
    activations = "float16" if choose is float16 else "int16"
    build = lowered(name, choose, "qualcomm", stage="edge", activations=activations, chunk="16")
    table_name = "model.embed_tokens.weight"
    table, ids = build.weights.dequantized(table_name), torch.tensor([0, 1, 8191, 5, 4000])
    assert torch.equal(open_embedding(build.folder)(ids), table[ids])


def test_float16_weights_on_a_cpu_agree_with_torch(lowered: Make) -> None:
    """A CPU computes with float16 constants in float32, so no value is rounded."""
    build = lowered("lfm2-untied", float16, "qualcomm", stage="edge", activations="float16")
    tokens = random_tokens(build.checkpoint.config, 1, 75)[0]
    actual = build.target.run(build.folder).step(tokens)
    reference = TorchStepper(build.program.run, build.checkpoint.config, build.request.context)
    expected = reference.step(tokens)
    assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))


@needs_qnn
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
@pytest.mark.parametrize("soc", ["sm8750", "sm8650"])
def test_qnn_agrees_with_torch(lowered: Make, name: str, choose: Choose, soc: str) -> None:
    build = lowered(name, choose, "qualcomm", soc=soc, chunk="16")
    (operators,) = run_rungs(build)
    assert operators.passed, operators
    assert {"decode.onnx", "prefill.onnx"} < set(build.artifact.beside)


@needs_qnn
@pytest.mark.parametrize("name", ["lfm2-untied", "lfm2_moe", "lfm3"])
def test_float16_in_qnn_agrees_with_torch(lowered: Make, name: str) -> None:
    build = lowered(name, float16, "qualcomm", activations="float16", chunk="16")
    (logits,) = run_rungs(build)
    assert logits.passed, logits


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_qnn_agrees_with_torch_for_trained_checkpoints(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, name: str
) -> None:
    build = lower(
        any_checkpoint(name), mixed_bits, tmp_path, name="qualcomm", options={"chunk": "16"}
    )
    (operators,) = run_rungs(build)
    assert operators.passed, operators


@needs_qnn
def test_qnn_prints_nothing(lowered: Make) -> None:
    """Only results, such as those of `--json`, are printed to stdout."""
    build = lowered("lfm3-attention-bias", mixed_bits, "qualcomm", chunk="16")
    code = f"""
from pathlib import Path
from lfmc.targets.base import get_target
print(get_target("qualcomm").run(Path({str(build.folder)!r})).step([1, 2, 3]).shape[0])
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "3\n"


@needs_qnn
def test_a_conversation_in_qnn_starts_over(lowered: Make) -> None:
    build = lowered("lfm3-attention-bias", mixed_bits, "qualcomm", chunk="16")
    assert_starts_over(build, 16)


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_stored_constants_match_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "qualcomm", stage="edge", activations="int16", chunk="16")
    errors = read_back(build, build.folder, build.artifact)
    assert set(errors) == {row.name for row in build.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in build.artifact.tensors)
    assert stored == sum(row.nbytes for row in build.plan.rows)


@pytest.mark.parametrize("part", ["scales", "codes"])
def test_a_wrong_weight_fails_the_operator_rung(lowered: Make, part: str) -> None:
    """One matrix in torch has scales that are 2 % off, or rows that are shifted by one."""
    build = lowered("lfm3-attention-bias", mixed_bits, "qualcomm", stage="edge", chunk="16")

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 1.02 if part == "scales" else tensor.roll(1, 0)

    with build.changed_constant(f"out_proj.{part}", change):
        operators, _ = build.target.operator_parity(build.program, build.folder, build.artifact)
    assert not operators.passed
    worst = max(operators.cases, key=lambda case: case.difference)
    assert worst.case.startswith("linear_nbits")


def test_a_changed_file_fails_readback(lowered: Make, tmp_path: Path) -> None:
    build = lowered("lfm3-attention-bias", mixed_bits, "qualcomm", stage="edge", chunk="16")
    path = build.folder / PARAMETERS
    data = path.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0x10
    try:
        path.write_bytes(changed)
        with pytest.raises(GateError, match="on disk differ from the plan"):
            read_back(build, build.folder, build.artifact)
    finally:
        path.write_bytes(data)


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    build = lowered("lfm2-untied", float16, "qualcomm", stage="edge", activations="float16")
    assert_context_ends(build)


def test_missing_files_and_packages_are_reported(
    lowered: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = lowered("lfm3-attention-bias", mixed_bits, "qualcomm", stage="edge", chunk="16")
    path = build.folder / SOURCE.format("decode")
    data = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(InputError, match="there is no model"):
            build.target.run(build.folder)
    finally:
        path.write_bytes(data)
    monkeypatch.setattr(session, "has_qnn", lambda: False)
    options = {**build.request.options, "stage": "context"}
    with pytest.raises(UnsupportedError, match="onnxruntime-qnn"):
        build.target.check(build.checkpoint.config, Request(96, options))
    reason = build.target.why_not_here(Request(96, options))
    assert reason is not None
    assert "onnxruntime-qnn" in reason
    assert build.target.why_not_here(build.request) is None


def test_floats_and_n_bit_weights_do_not_mix(
    lowered: Make, any_checkpoint: Callable[[str], object]
) -> None:
    with pytest.raises(UnsupportedError, match="float16 weights only"):
        lowered("lfm2-untied", eight_bit, "qualcomm", stage="edge", activations="float16")
