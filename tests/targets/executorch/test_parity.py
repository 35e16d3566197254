"""The program, run by ExecuTorch's runtime, against the same quantized weights in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.errors import InputError
from lfmc.parity.compare import cases, compare
from lfmc.run.stepper import TorchStepper, step_each
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
    made = lowered(name, choose, "executorch")
    config, context = made.checkpoint.config, made.asked.context
    reference = TorchStepper(made.reference(exact=False), config, context)
    tolerance = 1e-5 if choose is floats else 3e-2  # roundings turn
    rung = compare(
        3,
        "program",
        made.target.run(made.folder),
        reference,
        cases(config, context, full=True),
        config.vocab_size,
        tolerance=tolerance,
    )
    assert rung.passed, rung
    (single,) = (case for case in rung.cases if case.case == "one-token prompt")
    assert single.difference < 1e-5  # too few roundings for one of them to turn


def test_logits_of_the_last_token_only(lowered: Make) -> None:
    every = lowered("lfm2_moe", mixed, "executorch")
    last = lowered("lfm2_moe", mixed, "executorch", logits="last")
    config, context = last.checkpoint.config, last.asked.context
    tokens = random_tokens(config, 1, 50)[0]
    ours, theirs = (made.target.run(made.folder) for made in (last, every))
    found = ours.step(tokens)  # in two calls
    assert found.shape == (1, config.vocab_size)
    assert torch.equal(found, theirs.step(tokens)[-1:])
    ours.reset()
    theirs.reset()
    one_by_one = torch.cat([theirs.step(token) for token in tokens[:5].split(1)])
    assert torch.equal(step_each(ours, tokens[:5]), one_by_one)
    reference = TorchStepper(last.reference(exact=False), config, context)
    matrix = cases(config, context, full=True)
    rung = compare(3, "last", ours, reference, matrix, config.vocab_size, tolerance=3e-2)
    assert rung.passed, rung
    assert all(
        rung.passed
        for rung in last.target.operator_parity(last.program, last.folder, last.artifact)
    )


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_constants_on_disk_are_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "executorch")
    errors = read_back(made, made.folder, made.artifact)
    assert set(errors) == {row.name for row in made.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in made.artifact.tensors)
    assert stored == sum(row.nbytes for row in made.plan.rows)
    capabilities = made.target.capabilities(made.checkpoint.config)
    assert (made.folder / MODEL).stat().st_size <= stored + capabilities.graph_nbytes


def test_it_is_as_near_as_rounding_allows(lowered: Make) -> None:
    made = lowered("lfm2_moe", mixed, "executorch")
    assert made.target.tolerance(made.program, exact=False) is None
    products, noise = made.target.operator_parity(made.program, made.folder, made.artifact)
    assert products.passed, products
    assert {case.case for case in products.cases} == {
        "linear, 4 bits, groups of 32",
        "linear, 8 bits, a scale a row",
        "expert, 4 bits, groups of 32",
        "expert, 8 bits, a scale a row",
    }
    assert noise.passed, noise
    assert noise.cases[0].difference < 1e-3
    plain = lowered("lfm2", floats, "executorch")
    assert plain.target.tolerance(plain.program, exact=False) == 1e-4
    (rung,) = plain.target.operator_parity(plain.program, plain.folder, plain.artifact)
    assert rung.skipped


@pytest.mark.parametrize(("wrong", "ratio"), [(1.02, 0.1), (-1.0, 2.0)])
def test_a_wrong_scale_is_further_away(lowered: Make, wrong: float, ratio: float) -> None:
    """The scales of one matrix 2 % off, or of the wrong sign, in torch."""
    made = lowered("lfm2-untied", four_bit, "executorch")
    name = next(name for name in made.program.weights if name.endswith("w2.scales"))
    held = made.program.module.get_buffer(name)
    right = held.clone()
    try:
        held *= wrong
        products, noise = made.target.operator_parity(made.program, made.folder, made.artifact)
    finally:
        held.copy_(right)
    assert not products.passed
    assert noise.cases[0].difference > ratio
    assert noise.passed == (wrong > 0)


def test_a_second_conversation_equals_a_fresh_one(lowered: Make) -> None:
    made = lowered("lfm3-attention-bias", mixed, "executorch")
    tokens = random_tokens(made.checkpoint.config, 1, 30)[0]
    used, fresh = made.target.run(made.folder), made.target.run(made.folder)
    used.step(tokens[10:])
    used.reset()
    assert torch.equal(used.step(tokens[:10]), fresh.step(tokens[:10]))


def test_two_steppers_do_not_share_their_states(lowered: Make) -> None:
    made = lowered("lfm2", floats, "executorch")
    tokens = random_tokens(made.checkpoint.config, 1, 12)[0]
    one, other, alone = (made.target.run(made.folder) for _ in range(3))
    one.step(tokens[:6])
    other.step(tokens[6:])
    alone.step(tokens[:6])
    assert torch.equal(one.step(tokens[:1]), alone.step(tokens[:1]))


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    assert_context_ends(lowered("lfm2", floats, "executorch"))


def test_a_changed_weight_is_found(lowered: Make, tmp_path: Path) -> None:
    made = lowered("lfm2-untied", PROGRAMS[1][1], "executorch")
    data = bytearray((made.folder / MODEL).read_bytes())
    codes = made.weights.packed(("lm_head.weight",)).packed_codes().numpy().tobytes()
    data[data.index(codes) + 100] ^= 0x10
    (tmp_path / MODEL).write_bytes(data)
    with pytest.raises(InputError, match="has no constant 'codes:8192x32"):
        read_back(made, tmp_path, made.artifact)


def _shortened(data: bytes) -> bytes:
    return data[:5000]


def _of_another_version(data: bytes) -> bytes:
    assert data[4:6] == b"ET"
    return data[:4] + b"ET99" + data[8:]


@pytest.mark.parametrize("spoil", [_shortened, _of_another_version])
def test_a_program_that_no_runtime_takes_is_one_clear_error(
    lowered: Make, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    made = lowered("lfm2", floats, "executorch")
    with pytest.raises(InputError, match="no ExecuTorch program"):
        made.target.run(tmp_path)
    (tmp_path / MODEL).write_bytes(spoil((made.folder / MODEL).read_bytes()))
    with pytest.raises(InputError, match="can't load the program") as caught:
        made.target.run(tmp_path)
    assert "another version" in str(caught.value)


def test_rows_are_rounded_to_256_steps() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0], [-1.0, 0.2, 0.3], [2.0, 3.0, 4.0]])
    rounded = round_rows(x)
    assert float((rounded - x).abs().max()) <= 4.0 / 255 / 2 + 1e-6
    assert torch.equal(rounded == 0, x == 0)
    assert torch.equal(round_rows(torch.zeros(1, 3)), torch.zeros(1, 3))
    assert not torch.equal(rounded, x)
