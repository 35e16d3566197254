"""The artifact, run by ONNX Runtime, against the same quantized weights in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.checkpoint.checkpoint import Checkpoint, demo_path
from lfmc.model.config import SLIDING
from lfmc.parity.compare import ARTIFACT_TOLERANCE, FLOAT_TOLERANCE, cases
from lfmc.run.conversation import Conversation
from lfmc.run.stepper import decoder_stepper
from lfmc.targets.onnx.probe import operator_parity
from lfmc.targets.onnx.runtime import OnnxStepper
from tests.factories import random_tokens
from tests.targets.lowering import (
    Choose,
    Lowered,
    floats,
    for_browsers,
    four_bit,
    lower,
    mixed,
    two_bit,
    wide_groups,
)

Make = Callable[..., Lowered]
FLOAT_KERNELS: list[tuple[str, Choose, str]] = [
    ("lfm2", four_bit, "plain"),
    ("lfm2", wide_groups, "genai"),
    ("lfm2-conv-bias", four_bit, "plain"),
    ("lfm2-untied", two_bit, "plain"),
    ("lfm2_moe", four_bit, "plain"),
    ("lfm2_moe", floats, "plain"),
    ("lfm2_moe-scaled", four_bit, "plain"),
    ("lfm2_moe-scaled", floats, "plain"),
    ("lfm2-untied", for_browsers, "transformers.js"),
    ("lfm3", for_browsers, "transformers.js"),
    ("lfm2_moe-no-bias", four_bit, "transformers.js"),
    ("lfm3", four_bit, "plain"),
    ("lfm3-attention-bias", mixed, "plain"),
    ("lfm3-plain", floats, "plain"),
]


@pytest.mark.parametrize(("name", "choose", "layout"), FLOAT_KERNELS)
def test_matrix_with_float_activations(
    lowered: Make, name: str, choose: Choose, layout: str
) -> None:
    build = lowered(name, choose, layout=layout)
    config, context = build.checkpoint.config, build.request.context
    matrix = cases(config, context, full=True)
    assert any("window" in case.name for case in matrix) == (SLIDING in config.layer_types)
    assert build.target.tolerance(build.program, exact=True) == ARTIFACT_TOLERANCE
    stepper = build.target.run(build.folder, exact=True)
    rung = build.run_matrix(stepper, build.in_torch, tolerance=2e-5)
    assert rung.passed, rung


@pytest.mark.parametrize(
    ("name", "choose"),
    [("lfm2-moe-8m", mixed), ("lfm2_moe", mixed), ("lfm2-untied", two_bit), ("lfm3", four_bit)],
)
def test_every_operator_in_isolation_as_shipped(lowered: Make, name: str, choose: Choose) -> None:
    build = lowered(name, choose)
    rung = operator_parity(build.program, build.folder, build.artifact)
    assert rung.passed, rung
    assert rung.tolerance == FLOAT_TOLERANCE
    kinds = {case.case for case in rung.cases}
    assert any(kind.startswith("MatMulNBits") for kind in kinds)
    assert ("QMoE 2+4+8 bit" in kinds) == (choose is mixed)


@pytest.mark.parametrize("name", ["lfm2_moe", "lfm3"])
def test_every_operator_in_isolation_in_the_layout_for_browsers(lowered: Make, name: str) -> None:
    build = lowered(name, for_browsers, layout="transformers.js")
    rung = operator_parity(build.program, build.folder, build.artifact)
    assert rung.passed, rung
    kinds = {case.case for case in rung.cases}
    assert {"Gather 8 bit", "MatMulNBits 4 bit"} <= kinds
    assert ("QMoE 4+8 bit" in kinds) == (name == "lfm2_moe")


def test_an_artifact_without_nbit_operators_has_none_to_compare(lowered: Make) -> None:
    build = lowered("lfm2_moe", floats)
    rung = operator_parity(build.program, build.folder, build.artifact)
    assert rung.skipped == "the artifact has no n-bit operators"


def symmetric(row: PlanRow) -> Format:
    return Format(4, 32, True, "float16")


def test_a_tie_after_a_product_that_cancels_is_detected(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """With this plan, one row of the bundled checkpoint's experts depends on such a tie."""
    build = lower(any_checkpoint(demo_path().name), symmetric, tmp_path, context=128)
    rung = operator_parity(build.program, build.folder, build.artifact)
    assert rung.passed, rung


def test_mixed_experts_as_shipped_agree_with_the_same_rounding(lowered: Make) -> None:
    build = lowered("lfm2-moe-8m", mixed)
    tokens = random_tokens(build.checkpoint.config, 1, 40)
    actual = build.target.run(build.folder).step(tokens[0])
    conversation = Conversation((tokens[0],))
    rounded, unrounded = (
        model.run([conversation])[0].logits
        for model in (build.reference(exact=False), build.in_torch)
    )
    rounded_error = (actual - rounded).abs().mean() / rounded.abs().max()
    unrounded_error = (actual - unrounded).abs().mean() / rounded.abs().max()
    assert rounded_error < 0.5 * unrounded_error  # the reference reproduces the rounding


def test_a_batch_is_its_rows(lowered: Make) -> None:
    build = lowered("lfm3", four_bit)
    tokens = random_tokens(build.checkpoint.config, 2, 12)
    batch = OnnxStepper(build.folder, exact=True, batch=2)
    batch_logits = [
        batch.step(tokens[:, :8]),
        batch.step(tokens[:, 8:9]),
        batch.step(tokens[:, 9:10]),
    ]
    for row in range(2):
        stepper = OnnxStepper(build.folder, exact=True)
        single = torch.cat([stepper.step(tokens[row, :8]), stepper.step(tokens[row, 8:10])])
        torch.testing.assert_close(torch.cat(batch_logits, 1)[row], single, atol=2e-5, rtol=0)


def test_floats_equal_the_checkpoint(lowered: Make) -> None:
    build = lowered("lfm2_moe", floats)
    tokens = random_tokens(build.checkpoint.config, 1, 30)[0]
    actual = build.target.run(build.folder).step(tokens)
    expected = decoder_stepper(build.checkpoint.decoder(), 96).step(tokens)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_wrong_scale_fails_operator_parity(
    lowered: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build = lowered("lfm2-moe-8m", mixed)
    name = "model.layers.3.feed_forward.experts.0.w2.weight"
    packed = build.weights.packed((name,))
    wrong_scales = packed.scales.clone()
    wrong_scales[:, 0] *= 1.25
    folder = tmp_path_factory.mktemp("wrong")
    for file in build.artifact.files:
        data = (build.folder / file).read_bytes()
        right, wrong = (t.numpy().tobytes() for t in (packed.scales, wrong_scales))
        (folder / file).write_bytes(data.replace(right, wrong))
    assert (folder / "model.onnx.data").read_bytes() != (
        build.folder / "model.onnx.data"
    ).read_bytes()
    assert not operator_parity(build.program, folder, build.artifact).passed
