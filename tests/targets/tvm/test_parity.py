"""The library in TVM's runtime, against the same quantized weights in torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.errors import GateError, InputError, UnsupportedError
from lfmc.targets.base import get_target
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters
from lfmc.targets.tvm import runtime
from lfmc.targets.tvm.runtime import LIBRARY, TvmStepper
from lfmc.verification.readback import read_back
from tests.conftest import TRAINED
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered, four_bit, lower
from tests.targets.matrix import assert_context_ends
from tests.targets.programs import PROGRAMS, floats, mixed

Lower = Callable[..., Lowered]


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(lowered: Lower, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "tvm")
    exact = choose is not floats  # float weights: the shipped functions do not round
    stepper = build.target.run(build.folder, exact=exact)
    rung = build.run_matrix(stepper, build.reference(exact=True), tolerance=1e-5)
    assert rung.passed, rung


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_constants_on_disk_match_the_plan(lowered: Lower, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "tvm")
    errors = read_back(build, build.folder, build.artifact)
    assert set(errors) == {row.name for row in build.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in build.artifact.tensors)
    assert stored <= sum(row.nbytes for row in build.plan.rows)
    capabilities = build.target.capabilities(build.checkpoint.config)
    nbytes = sum((build.folder / name).stat().st_size for name in (LIBRARY, PARAMETERS))
    assert nbytes <= stored + capabilities.graph_nbytes


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_every_shipped_product_matches_torch(lowered: Lower, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "tvm")
    rungs = build.target.operator_parity(build.program, build.folder, build.artifact)
    if choose is floats:
        assert [bool(rung.skipped) for rung in rungs] == [True]
        assert build.target.tolerance(build.program, exact=False) == 1e-4
        return
    assert all(rung.passed for rung in rungs), rungs
    kinds = {case.case for case in rungs[0].cases}
    assert "rounding of activations" in kinds
    if name == "lfm2_moe":
        widths = {f"expert's w2, {bits} bits, groups of 32" for bits in (2, 3, 4, 6, 8)}
        assert widths <= kinds
    assert rungs[1].cases[0].difference < 1e-3  # at the first tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], object], tmp_path: Path, name: str
) -> None:
    build = lower(any_checkpoint(name), mixed, tmp_path, name="tvm", context=192)  # type: ignore[arg-type]
    stepper = build.target.run(build.folder, exact=True)
    rung = build.run_matrix(stepper, build.in_torch, tolerance=1e-5)
    assert rung.passed, rung
    rungs = build.target.operator_parity(build.program, build.folder, build.artifact)
    assert all(rung.passed for rung in rungs), rungs


def test_a_wrong_scale_fails_operator_parity(lowered: Lower) -> None:
    """Change the scales of one matrix by 2 % in torch."""
    build = lowered("lfm2-untied", four_bit, "tvm")
    with build.changed_constant("w2.scales", lambda scales: scales * 1.02):
        products, _ = build.target.operator_parity(build.program, build.folder, build.artifact)
    assert not products.passed


def test_a_changed_weight_fails_readback(lowered: Lower, tmp_path: Path) -> None:
    build = lowered("lfm2-untied", four_bit, "tvm")
    data = bytearray((build.folder / PARAMETERS).read_bytes())
    data[-2000 - len(data) // 2] ^= 0x10
    (tmp_path / PARAMETERS).write_bytes(data)
    with pytest.raises(GateError, match="on disk differ from the plan"):
        read_back(build, tmp_path, build.artifact)


def test_prefill_returns_the_logits_of_the_last_token(lowered: Lower) -> None:
    build = lowered("lfm2_moe", mixed, "tvm")
    tokens = random_tokens(build.checkpoint.config, 1, 50)[0]
    first, second = TvmStepper(build.folder), TvmStepper(build.folder)
    last, logits = first.prefill(tokens), second.step(tokens)
    assert last.shape == (1, build.checkpoint.config.vocab_size)
    assert torch.allclose(last, logits[-1:], atol=1e-5 * float(logits.abs().max()))
    assert torch.equal(first.step(tokens[:1]), second.step(tokens[:1]))


def test_long_calls_are_split_into_chunks(lowered: Lower) -> None:
    build = lowered("lfm2-untied", four_bit, "tvm", chunk="32")
    reference = lowered("lfm2-untied", four_bit, "tvm")
    assert open_parameters(build.folder).facts["chunk"] == 32
    tokens = random_tokens(build.checkpoint.config, 1, 80)[0]
    actual, expected = (
        lowered_build.target.run(lowered_build.folder).step(tokens)
        for lowered_build in (build, reference)
    )
    assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_second_conversation_equals_a_fresh_one(lowered: Lower) -> None:
    build = lowered("lfm3-attention-bias", mixed, "tvm")
    tokens = random_tokens(build.checkpoint.config, 1, 30)[0]
    used, fresh = build.target.run(build.folder), build.target.run(build.folder)
    used.step(tokens[10:])
    used.reset()
    assert torch.equal(used.step(tokens[:10]), fresh.step(tokens[:10]))


def test_calls_beyond_the_context_are_refused(lowered: Lower) -> None:
    assert_context_ends(lowered("lfm2-conv-bias", floats, "tvm"))


def test_a_library_with_the_parameters_of_another_is_refused(
    lowered: Lower, tmp_path: Path
) -> None:
    build, other_build = lowered("lfm2-untied", four_bit, "tvm"), lowered("lfm2_moe", mixed, "tvm")
    with pytest.raises(InputError, match="there is no library"):
        build.target.run(tmp_path)
    shutil.copy(build.folder / LIBRARY, tmp_path)
    shutil.copy(other_build.folder / PARAMETERS, tmp_path)
    with pytest.raises(InputError, match="can't load the library"):
        build.target.run(tmp_path)
    (tmp_path / LIBRARY).unlink()  # the file may still be mapped
    (tmp_path / LIBRARY).write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match="can't load the library"):
        build.target.run(tmp_path)


def test_a_cpu_without_the_instructions_is_refused(
    lowered: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = lowered("lfm2-untied", four_bit, "tvm")
    monkeypatch.setattr(runtime, "machine_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(UnsupportedError, match="this machine can't run the library"):
        build.target.run(build.folder)


def test_sizes_that_are_not_multiples_of_16_are_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.lowering.request import Options, make_request

    path = tiny_checkpoint("lfm2", hidden_size=72, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="the hidden size is no multiple of 16"):
        make_request(open_checkpoint(path), get_target("tvm"), Options(context=32))


def test_w1_and_w3_with_different_groups_are_refused(
    any_checkpoint: Callable[[str], object], tmp_path: Path
) -> None:
    def choose(row: PlanRow) -> Format:
        wide = row.role == "expert" and row.name.endswith("w3.weight")
        return Format(4, 64 if wide else 32, True, "float16")

    with pytest.raises(UnsupportedError, match="have different group sizes"):
        lower(any_checkpoint("lfm2_moe"), choose, tmp_path, name="tvm")  # type: ignore[arg-type]
