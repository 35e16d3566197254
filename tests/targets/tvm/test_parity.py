"""The library, run by TVM's runtime, against the same quantized weights in torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.errors import GateError, InputError, UnsupportedError
from lfmc.parity.compare import cases, compare
from lfmc.run.stepper import TorchStepper
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

Make = Callable[..., Lowered]


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "tvm")
    config, context = made.checkpoint.config, made.asked.context
    exact = choose is not floats  # with floats, what ships rounds nothing
    rung = compare(
        3,
        "library",
        made.target.run(made.folder, exact=exact),
        TorchStepper(
            made.reference(exact=True),
            config,
            context,
        ),
        cases(config, context, full=True),
        config.vocab_size,
        tolerance=1e-5,
    )
    assert rung.passed, rung


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_constants_on_disk_are_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "tvm")
    errors = read_back(made, made.folder, made.artifact)
    assert set(errors) == {row.name for row in made.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in made.artifact.tensors)
    assert stored <= sum(row.nbytes for row in made.plan.rows)
    capabilities = made.target.capabilities(made.checkpoint.config)
    nbytes = sum((made.folder / name).stat().st_size for name in (LIBRARY, PARAMETERS))
    assert nbytes <= stored + capabilities.graph_nbytes


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_every_product_is_right_as_shipped(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "tvm")
    rungs = made.target.operator_parity(made.program, made.folder, made.artifact)
    if choose is floats:
        assert [bool(rung.skipped) for rung in rungs] == [True]
        assert made.target.tolerance(made.program, exact=False) == 1e-4
        return
    assert all(rung.passed for rung in rungs), rungs
    kinds = {case.case for case in rungs[0].cases}
    assert "rounding of activations" in kinds
    if name == "lfm2_moe":
        widths = {f"expert's w2, {bits} bits, groups of 32" for bits in (2, 3, 4, 6, 8)}
        assert widths <= kinds
    assert rungs[1].cases[0].difference < 1e-3  # of first tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], object], tmp_path: Path, name: str
) -> None:
    made = lower(any_checkpoint(name), mixed, tmp_path, name="tvm", context=192)  # type: ignore[arg-type]
    config = made.checkpoint.config
    rung = compare(
        3,
        "library",
        made.target.run(made.folder, exact=True),
        TorchStepper(made.program.module, config, 192),
        cases(config, 192, full=True),
        config.vocab_size,
        tolerance=1e-5,
    )
    assert rung.passed, rung
    rungs = made.target.operator_parity(made.program, made.folder, made.artifact)
    assert all(rung.passed for rung in rungs), rungs


def test_a_wrong_scale_is_found(lowered: Make) -> None:
    """The scales of one matrix 2 % off, in torch."""
    made = lowered("lfm2-untied", four_bit, "tvm")
    name = next(name for name in made.program.weights if name.endswith("w2.scales"))
    held = made.program.module.get_buffer(name)
    right = held.clone()
    try:
        held *= 1.02
        products, _ = made.target.operator_parity(made.program, made.folder, made.artifact)
    finally:
        held.copy_(right)
    assert not products.passed


def test_a_changed_weight_is_found(lowered: Make, tmp_path: Path) -> None:
    made = lowered("lfm2-untied", four_bit, "tvm")
    data = bytearray((made.folder / PARAMETERS).read_bytes())
    data[-2000 - len(data) // 2] ^= 0x10
    (tmp_path / PARAMETERS).write_bytes(data)
    with pytest.raises(GateError, match="on disk are not the plan's"):
        read_back(made, tmp_path, made.artifact)


def test_a_prompt_gives_the_logits_of_its_last_token(lowered: Make) -> None:
    made = lowered("lfm2_moe", mixed, "tvm")
    tokens = random_tokens(made.checkpoint.config, 1, 50)[0]
    one, other = TvmStepper(made.folder), TvmStepper(made.folder)
    found, every = one.prefill(tokens), other.step(tokens)
    assert found.shape == (1, made.checkpoint.config.vocab_size)
    assert torch.allclose(found, every[-1:], atol=1e-5 * float(every.abs().max()))
    assert torch.equal(one.step(tokens[:1]), other.step(tokens[:1]))


def test_calls_are_cut_into_chunks(lowered: Make) -> None:
    made = lowered("lfm2-untied", four_bit, "tvm", chunk="32")
    whole = lowered("lfm2-untied", four_bit, "tvm")
    assert open_parameters(made.folder).facts["chunk"] == 32
    tokens = random_tokens(made.checkpoint.config, 1, 80)[0]
    found, expected = (m.target.run(m.folder).step(tokens) for m in (made, whole))
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_second_conversation_equals_a_fresh_one(lowered: Make) -> None:
    made = lowered("lfm3-attention-bias", mixed, "tvm")
    tokens = random_tokens(made.checkpoint.config, 1, 30)[0]
    used, fresh = made.target.run(made.folder), made.target.run(made.folder)
    used.step(tokens[10:])
    used.reset()
    assert torch.equal(used.step(tokens[:10]), fresh.step(tokens[:10]))


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    assert_context_ends(lowered("lfm2-conv-bias", floats, "tvm"))


def test_a_library_with_the_parameters_of_another_is_refused(lowered: Make, tmp_path: Path) -> None:
    one, other = lowered("lfm2-untied", four_bit, "tvm"), lowered("lfm2_moe", mixed, "tvm")
    with pytest.raises(InputError, match="there is no library"):
        one.target.run(tmp_path)
    shutil.copy(one.folder / LIBRARY, tmp_path)
    shutil.copy(other.folder / PARAMETERS, tmp_path)
    with pytest.raises(InputError, match="can't load the library"):
        one.target.run(tmp_path)
    (tmp_path / LIBRARY).unlink()  # it may still be mapped
    (tmp_path / LIBRARY).write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match="can't load the library"):
        one.target.run(tmp_path)


def test_a_cpu_that_can_not_run_it_is_told_so(
    lowered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lowered("lfm2-untied", four_bit, "tvm")
    monkeypatch.setattr(runtime, "machine_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(UnsupportedError, match="this machine can't run the library"):
        made.target.run(made.folder)


def test_sizes_that_kernels_do_not_take_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.lowering.request import Options, request

    path = tiny_checkpoint("lfm2", hidden_size=72, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="the hidden size is no multiple of 16"):
        request(open_checkpoint(path), get_target("tvm"), Options(context=32))


def test_w1_and_w3_of_other_groups_are_refused(
    any_checkpoint: Callable[[str], object], tmp_path: Path
) -> None:
    def choose(row: PlanRow) -> Format:
        wide = row.role == "expert" and row.name.endswith("w3.weight")
        return Format(4, 64 if wide else 32, True, "float16")

    with pytest.raises(UnsupportedError, match="w1 and w3 have groups of different sizes"):
        lower(any_checkpoint("lfm2_moe"), choose, tmp_path, name="tvm")  # type: ignore[arg-type]
