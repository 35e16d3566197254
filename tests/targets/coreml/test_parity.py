"""The package, run by the interpreter, against the same quantized weights in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError, InputError
from lfmc.run.conversation import Conversation, SteppedModel
from lfmc.run.expert_choice import RecordsExpertChoice
from lfmc.run.stepper import TorchStepper
from lfmc.targets.coreml.probe import operator_parity
from lfmc.targets.coreml.target import TOLERANCE
from lfmc.verification.readback import read_back
from tests.factories import random_tokens
from tests.targets.coreml.packages import (
    FLOAT16,
    PACKAGES,
    four_bit,
    half,
    matrix_rung,
    mixed,
    palettes,
)
from tests.targets.lowering import Choose, Lowered, lower

Make = Callable[..., Lowered]


@pytest.mark.parametrize(("name", "choose", "options"), PACKAGES)
def test_matrix_in_float32(
    lowered: Make, name: str, choose: Choose, options: dict[str, str]
) -> None:
    build = lowered(name, choose, "coreml", **options)
    rung = matrix_rung(build, build.target.run(build.folder, exact=True), TOLERANCE / 100)
    assert rung.passed, rung


@pytest.mark.parametrize(("name", "choose", "options"), PACKAGES)
def test_constants_on_disk_match_the_plan(
    lowered: Make, name: str, choose: Choose, options: dict[str, str]
) -> None:
    build = lowered(name, choose, "coreml", **options)
    errors = read_back(build, build.folder, build.artifact)
    quantized = {row.name for row in build.plan.rows if row.format.startswith(("int", "lut"))}
    assert set(errors) == quantized
    stored = sum(tensor.nbytes for tensor in build.artifact.tensors)
    planned = sum(row.nbytes for row in build.plan.rows)
    assert 0.99 * planned <= stored <= planned
    capabilities = build.target.capabilities(build.checkpoint.config)
    total = sum((build.folder / name).stat().st_size for name in build.artifact.files)
    assert total <= planned + capabilities.graph_nbytes


@pytest.mark.parametrize(
    ("name", "choose", "kinds"),
    [
        ("lfm2_moe", mixed, {"gather 8 bit", "linear 4 bit", "linear 8 bit"}),
        ("lfm2_moe", palettes, {"gather 6 bit", "linear 3 bit", "linear 6 bit"}),
    ],
)
def test_every_operator_in_isolation_in_float16(
    lowered: Make, name: str, choose: Choose, kinds: set[str]
) -> None:
    build = lowered(name, choose, "coreml")
    rung = operator_parity(build.program, build.folder, build.artifact)
    assert rung.passed, rung
    assert {case.case for case in rung.cases} == kinds


@pytest.mark.parametrize(("name", "choose", "options"), PACKAGES)
def test_matrix_rounded_to_float16(
    lowered: Make, name: str, choose: Choose, options: dict[str, str]
) -> None:
    build = lowered(name, choose, "coreml", **options)
    rung = matrix_rung(build, build.target.run(build.folder), FLOAT16)
    assert rung.passed, rung
    assert rung.worst is not None
    assert rung.worst > 1e-4  # the package does round


def test_the_stepper_records_the_chosen_experts(lowered: Make) -> None:
    build = lowered("lfm2_moe", mixed, "coreml")
    config, stepper = build.checkpoint.config, build.target.run(build.folder, exact=True)
    assert config.moe is not None
    tokens = random_tokens(config, 1, 10)[0]
    conversation = Conversation((tokens[:9], tokens[9:]))  # prefill, then decode
    (actual,), (expected,) = (
        model.run([conversation]) for model in (SteppedModel(stepper), build.in_torch)
    )
    assert actual.choice is not None
    assert expected.choice is not None
    assert expected.choice.experts.shape == (3, 10, config.moe.top_k)
    assert torch.equal(actual.choice.experts, expected.choice.experts)
    assert len(actual.choice.experts.unique()) > config.moe.top_k


def test_a_dense_model_records_no_choice(lowered: Make) -> None:
    build = lowered("lfm2", four_bit, "coreml")
    stepper = build.target.run(build.folder)
    stepper.step([1, 5, 9])
    assert isinstance(stepper, RecordsExpertChoice)
    assert stepper.choice is None


@pytest.mark.parametrize(
    ("name", "choose"), [("lfm2", four_bit), ("lfm2-untied", palettes), ("lfm3", half)]
)
def test_tall_matrices_in_pieces(
    any_checkpoint: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    choose: Choose,
) -> None:
    """Embedding and head have 8,192 rows; a piece has at most 3,000."""
    monkeypatch.setattr("lfmc.targets.coreml.target.ROWS", 3000)
    build = lower(any_checkpoint(name), choose, tmp_path, name="coreml", options={"tall": "split"})
    names = [tensor.name for tensor in build.artifact.tensors if "embed_tokens" in tensor.name]
    assert [sum(f".piece{i}" in name for name in names) > 0 for i in range(4)] == [1, 1, 1, 0]
    rung = matrix_rung(build, build.target.run(build.folder, exact=True), TOLERANCE / 100)
    assert rung.passed, rung
    read_back(build, build.folder, build.artifact)
    operators = operator_parity(build.program, build.folder, build.artifact)
    assert operators.passed or (choose is half and operators.skipped), operators


def test_a_padded_chunk_leaves_no_trace(lowered: Make) -> None:
    build = lowered("lfm3", mixed, "coreml")
    tokens = random_tokens(build.checkpoint.config, 1, 20)[0]
    chunked, single = (build.target.run(build.folder, exact=True) for _ in range(2))
    chunked.step(tokens[:19])  # in a chunk of 64
    one_by_one = torch.cat([single.step(token.view(1)) for token in tokens[:19]])
    assert torch.allclose(chunked.step(tokens[19:]), single.step(tokens[19:]), atol=1e-4)
    assert one_by_one.shape == (19, build.checkpoint.config.vocab_size)


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    build = lowered("lfm2", four_bit, "coreml")
    context = build.request.context
    tokens = random_tokens(build.checkpoint.config, 1, context)[0]
    stepper = build.target.run(build.folder, exact=True)
    reference = TorchStepper(build.program.run, build.checkpoint.config, context)
    actual = torch.cat([stepper.step(tokens[:50]), stepper.step(tokens[50:])])  # 50 + 46 of 96
    scale = float(actual.abs().max())
    assert torch.allclose(actual, reference.step(tokens), atol=TOLERANCE * scale / 100)
    with pytest.raises(InputError, match="longer than the exported context"):
        stepper.step([1])
    stepper.reset()
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([build.checkpoint.config.vocab_size])
    with pytest.raises(InputError, match="at least one token"):
        stepper.step([])


def test_a_changed_weight_is_detected(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    build = lower(any_checkpoint("lfm2"), four_bit, tmp_path, name="coreml")
    weights = next(tmp_path.rglob("weight.bin"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x10
    weights.write_bytes(data)
    program = next(tmp_path.rglob("model.mlmodel"))
    program.touch()
    with pytest.raises(GateError, match="differ from the plan"):
        read_back(build, tmp_path, build.artifact)
