"""Parity of the program in ExecuTorch's runtime with the same quantized weights in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.errors import InputError
from lfmc.run.stepper import step_all_logits
from lfmc.targets.executorch.activations import round_rows
from lfmc.targets.executorch.stored import MODEL
from lfmc.verification.readback import read_back
from tests.factories import random_tokens
from tests.targets.executorch.programs import PROGRAMS, floats, four_bit, mixed
from tests.targets.lowering import Choose, Lowered
from tests.targets.matrix import assert_context_ends

Make = Callable[..., Lowered]


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(lowered: Make, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "executorch")
    tolerance = 1e-5 if choose is floats else 3e-2  # a few values round differently
    stepper = build.target.run(build.folder)
    rung = build.run_matrix(stepper, build.reference(exact=False), tolerance=tolerance)
    assert rung.passed, rung
    (single,) = (case for case in rung.cases if case.case == "one-token prompt")
    assert single.difference < 1e-5  # too few roundings for a different one


def test_logits_of_the_last_token_only(lowered: Make) -> None:
    all_build = lowered("lfm2_moe", mixed, "executorch")
    last_build = lowered("lfm2_moe", mixed, "executorch", logits="last")
    config = last_build.checkpoint.config
    tokens = random_tokens(config, 1, 50)[0]
    last_stepper, all_stepper = (
        build.target.run(build.folder) for build in (last_build, all_build)
    )
    logits = last_stepper.step(tokens)  # in two calls
    assert logits.shape == (1, config.vocab_size)
    assert torch.equal(logits, all_stepper.step(tokens)[-1:])
    last_stepper.reset()
    all_stepper.reset()
    one_by_one = torch.cat([all_stepper.step(token) for token in tokens[:5].split(1)])
    assert torch.equal(step_all_logits(last_stepper, tokens[:5]), one_by_one)
    rung = last_build.run_matrix(last_stepper, last_build.reference(exact=False), tolerance=3e-2)
    assert rung.passed, rung
    assert all(
        rung.passed
        for rung in last_build.target.operator_parity(
            last_build.program, last_build.folder, last_build.artifact
        )
    )


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_constants_on_disk_are_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "executorch")
    errors = read_back(build, build.folder, build.artifact)
    assert set(errors) == {row.name for row in build.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in build.artifact.tensors)
    assert stored == sum(row.nbytes for row in build.plan.rows)
    capabilities = build.target.capabilities(build.checkpoint.config)
    assert (build.folder / MODEL).stat().st_size <= stored + capabilities.graph_nbytes


def test_the_error_is_within_rounding_noise(lowered: Make) -> None:
    build = lowered("lfm2_moe", mixed, "executorch")
    assert build.target.tolerance(build.program, exact=False) is None
    products, noise = build.target.operator_parity(build.program, build.folder, build.artifact)
    assert products.passed, products
    assert {case.case for case in products.cases} == {
        "linear, 4 bits, groups of 32",
        "linear, 8 bits, one scale per row",
        "expert, 4 bits, groups of 32",
        "expert, 8 bits, one scale per row",
    }
    assert noise.passed, noise
    assert noise.cases[0].difference < 1e-3
    float_build = lowered("lfm2", floats, "executorch")
    assert float_build.target.tolerance(float_build.program, exact=False) == 1e-4
    (rung,) = float_build.target.operator_parity(
        float_build.program, float_build.folder, float_build.artifact
    )
    assert rung.skipped


@pytest.mark.parametrize(("factor", "ratio"), [(1.02, 0.1), (-1.0, 2.0)])
def test_a_wrong_scale_exceeds_rounding_noise(lowered: Make, factor: float, ratio: float) -> None:
    """The scales of one matrix in torch are wrong by 2 %, or have the wrong sign."""
    build = lowered("lfm2-untied", four_bit, "executorch")
    with build.changed_constant("w2.scales", lambda scales: scales * factor):
        products, noise = build.target.operator_parity(build.program, build.folder, build.artifact)
    assert not products.passed
    assert noise.cases[0].difference > ratio
    assert noise.passed == (factor > 0)


def test_a_second_conversation_equals_a_fresh_one(lowered: Make) -> None:
    build = lowered("lfm3-attention-bias", mixed, "executorch")
    tokens = random_tokens(build.checkpoint.config, 1, 30)[0]
    reused, fresh = build.target.run(build.folder), build.target.run(build.folder)
    reused.step(tokens[10:])
    reused.reset()
    assert torch.equal(reused.step(tokens[:10]), fresh.step(tokens[:10]))


def test_two_steppers_do_not_share_their_states(lowered: Make) -> None:
    build = lowered("lfm2", floats, "executorch")
    tokens = random_tokens(build.checkpoint.config, 1, 12)[0]
    first, second, reference = (build.target.run(build.folder) for _ in range(3))
    first.step(tokens[:6])
    second.step(tokens[6:])
    reference.step(tokens[:6])
    assert torch.equal(first.step(tokens[:1]), reference.step(tokens[:1]))


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    assert_context_ends(lowered("lfm2", floats, "executorch"))


def test_a_changed_weight_is_detected(lowered: Make, tmp_path: Path) -> None:
    build = lowered("lfm2-untied", PROGRAMS[1][1], "executorch")
    data = bytearray((build.folder / MODEL).read_bytes())
    codes = build.weights.packed(("lm_head.weight",)).packed_codes().numpy().tobytes()
    data[data.index(codes) + 100] ^= 0x10
    (tmp_path / MODEL).write_bytes(data)
    with pytest.raises(InputError, match="has no constant 'codes:8192x32"):
        read_back(build, tmp_path, build.artifact)


def _shortened(data: bytes) -> bytes:
    return data[:5000]


def _of_another_version(data: bytes) -> bytes:
    assert data[4:6] == b"ET"
    return data[:4] + b"ET99" + data[8:]


@pytest.mark.parametrize("spoil", [_shortened, _of_another_version])
def test_a_program_that_the_runtime_rejects_raises_one_error(
    lowered: Make, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    build = lowered("lfm2", floats, "executorch")
    with pytest.raises(InputError, match="no ExecuTorch program"):
        build.target.run(tmp_path)
    (tmp_path / MODEL).write_bytes(spoil((build.folder / MODEL).read_bytes()))
    with pytest.raises(InputError, match="can't load the program") as caught:
        build.target.run(tmp_path)
    assert "another version" in str(caught.value)


def test_rows_are_rounded_to_256_steps() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0], [-1.0, 0.2, 0.3], [2.0, 3.0, 4.0]])
    rounded = round_rows(x)
    assert float((rounded - x).abs().max()) <= 4.0 / 255 / 2 + 1e-6
    assert torch.equal(rounded == 0, x == 0)
    assert torch.equal(round_rows(torch.zeros(1, 3)), torch.zeros(1, 3))
    assert not torch.equal(rounded, x)
