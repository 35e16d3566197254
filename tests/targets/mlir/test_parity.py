"""The module, run by IREE, against the same quantized weights in torch."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.errors import GateError, InputError, UnsupportedError
from lfmc.targets.base import get_target
from lfmc.targets.mlir.devices import DEVICES
from lfmc.targets.mlir.layout import pack_groups
from lfmc.targets.mlir.runtime import MODULE
from lfmc.targets.mlir.target import DIALECTS
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters
from lfmc.verification.readback import read_back
from tests.conftest import TRAINED
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered, four_bit, lower
from tests.targets.matrix import assert_context_ends, assert_matrix
from tests.targets.programs import PROGRAMS, floats, mixed, some_slow

Make = Callable[..., Lowered]
# Compiling takes a minute per sparse layer with experts of every width, so one layer has them.
SHORT = {"lfm2_moe": "lfm2_moe-short"}
MLIR_PROGRAMS = [(SHORT.get(name, name), choose) for name, choose in PROGRAMS]


def assert_parity(build: Lowered) -> None:
    assert_matrix(build, build.target.run(build.folder))


@pytest.mark.parametrize(("name", "choose"), MLIR_PROGRAMS)
def test_matrix(lowered: Make, name: str, choose: Choose) -> None:
    assert_parity(lowered(name, choose, "mlir"))


# The dialect torch runs in every suite, in `test_named_operators`.
@pytest.mark.parametrize("dialect", some_slow(DIALECTS[1:], ["tosa"]))
def test_matrix_of_other_dialects(lowered: Make, dialect: str) -> None:
    """The compiled module is lowered from the module that the bundle contains."""
    build = lowered("lfm3-attention-bias", mixed, "mlir", dialect=dialect)
    assert_parity(build)
    code = (build.folder / "model.mlirbc").read_bytes()
    assert code[:4] == b"ML\xefR"
    assert dialect.encode() in code


def test_named_operators(lowered: Make) -> None:
    """The bundle's module contains the operators with their definitions, which are executed."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    build = lowered("lfm2_moe-short", mixed, "mlir", dialect="torch", operators="named")
    assert_parity(build)
    context = ir.Context()
    torch_dialect.register_dialect(context)
    with context:
        module = ir.Module.parse((build.folder / "model.mlirbc").read_bytes())
    functions = {str(op.attributes["sym_name"]).strip('"'): op for op in module.body.operations}
    parameter_names = open_parameters(build.folder).facts["parameters"]
    operations = [operation.operation for operation in functions["decode"].regions[0].blocks[0]]
    counts = Counter()
    for operation in (op for op in operations if op.name == "torch.operator"):
        form = json.loads(ir.StringAttr(operation.operands[-1].owner.attributes["value"]).value)
        counts[str(operation.attributes["name"]).strip('"')] += 1
        definition = functions[form["definition"]]
        assert str(definition.attributes["sym_visibility"]) == '"private"'
        types = [value.type for value in operation.operands][:-1]
        assert [value.type for value in definition.regions[0].blocks[0].arguments] == types
        assert set(form["parameters"]) <= set(parameter_names)
        if "nbits" in form["definition"]:
            assert form["bits"] in (2, 3, 4, 6, 8)
    assert counts == {
        "torch.lfm.embedding_nbits": 1,
        "torch.lfm.linear_nbits": 7,
        "torch.lfm.rms_norm": 1,
        "torch.lfm.add_rms_norm": 4,
        "torch.lfm.gated_short_conv": 1,
        "torch.lfm.attention": 1,
        "torch.lfm.swiglu": 1,
        "torch.lfm.moe": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], object], tmp_path: Path, name: str
) -> None:
    build = lower(any_checkpoint(name), four_bit, tmp_path, name="mlir", context=192)  # type: ignore[arg-type]
    assert_parity(build)


@pytest.mark.parametrize(("name", "choose"), MLIR_PROGRAMS)
def test_constants_on_disk_are_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "mlir")
    errors = read_back(build, build.folder, build.artifact)
    assert set(errors) == {row.name for row in build.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in build.artifact.tensors)
    assert stored <= sum(row.nbytes for row in build.plan.rows)


def test_a_changed_weight_is_found(lowered: Make, tmp_path: Path) -> None:
    build = lowered("lfm2-untied", four_bit, "mlir")
    data = bytearray((build.folder / PARAMETERS).read_bytes())
    data[-2000 - len(data) // 2] ^= 0x10
    (tmp_path / PARAMETERS).write_bytes(data)
    with pytest.raises(GateError, match="on disk differ from the plan"):
        read_back(build, tmp_path, build.artifact)


def test_a_wrong_scale_fails_the_matrix(lowered: Make) -> None:
    """The scales of one matrix in torch are wrong by 2 %."""
    build = lowered("lfm2-untied", four_bit, "mlir")
    with (
        build.changed_constant("w2.scales", lambda scales: scales * 1.02),
        pytest.raises(AssertionError),
    ):
        assert_parity(build)


def test_prefill_returns_the_logits_of_the_last_token(lowered: Make) -> None:
    build = lowered("lfm2_moe-short", mixed, "mlir")
    # Calls of 64 and 8 tokens, then single tokens.
    tokens = random_tokens(build.checkpoint.config, 1, 75)[0]
    prefiller, scorer = build.target.run(build.folder), build.target.run(build.folder)
    last, all_logits = prefiller.prefill(tokens), scorer.step(tokens)
    assert last.shape == (1, build.checkpoint.config.vocab_size)
    assert torch.allclose(last, all_logits[-1:], atol=1e-5 * float(all_logits.abs().max()))
    assert torch.equal(prefiller.step(tokens[:1]), scorer.step(tokens[:1]))


def test_conversations_do_not_share_states(lowered: Make) -> None:
    """States are variables of a module instance; each stepper has its own instance."""
    build = lowered("lfm3-attention-bias", mixed, "mlir")
    tokens = random_tokens(build.checkpoint.config, 1, 30)[0]
    first, second = build.target.run(build.folder), build.target.run(build.folder)
    first.step(tokens[:9])
    second.step(tokens[20:])
    logits = first.step(tokens[9:20])
    second.reset()
    second.step(tokens[:9])
    assert torch.equal(second.step(tokens[9:20]), logits)


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    assert_context_ends(lowered("lfm2-conv-bias", floats, "mlir"))


def test_an_invalid_module_is_refused(lowered: Make, tmp_path: Path) -> None:
    dense, moe = lowered("lfm2-untied", four_bit, "mlir"), lowered("lfm2_moe-short", mixed, "mlir")
    shutil.copy(moe.folder / PARAMETERS, tmp_path)
    with pytest.raises(InputError, match="there is no module"):
        dense.target.run(tmp_path)
    shutil.copy(dense.folder / MODULE, tmp_path)
    with pytest.raises(InputError, match="can't load the module"):
        dense.target.run(tmp_path)
    (tmp_path / MODULE).unlink()  # the file may still be mapped
    (tmp_path / MODULE).write_bytes(b"0" * 5000)
    with pytest.raises(InputError, match="can't load the module"):
        dense.target.run(tmp_path)


def test_modules_contain_no_weights(lowered: Make) -> None:
    """The MLIR module and the compiled module take the weights from the parameters."""
    build = lowered("lfm2-untied", four_bit, "mlir")
    name = next(row.name for row in build.plan.rows if row.role == "embedding")
    raw = pack_groups(build.weights.packed((name,)).scales).flatten()[:64].numpy().tobytes()
    assert raw in (build.folder / PARAMETERS).read_bytes()
    assert raw not in (build.folder / MODULE).read_bytes()
    assert raw not in (build.folder / "model.mlirbc").read_bytes()


def test_sizes_that_the_layout_does_not_support_are_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.lowering.request import Options, make_request

    path = tiny_checkpoint("lfm2", hidden_size=72, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="the hidden size is no multiple of 16"):
        make_request(open_checkpoint(path), get_target("mlir"), Options(context=32))


GPUS = [name for name, device in DEVICES.items() if not device.is_cpu and name != "vulkan"]
QUICK_GPUS = ("cuda", "hip:gfx1100", "vulkan:adreno")  # one of each compiler back end


@pytest.mark.parametrize("device", some_slow(GPUS, QUICK_GPUS))
def test_modules_for_gpus_are_compiled_and_marked_as_not_executed(
    lowered: Make, device: str
) -> None:
    build = lowered("lfm2-untied", four_bit, "mlir", device=device)
    assert build.target.why_not_here(build.request) is not None
    facts = build.artifact.facts["code_objects"]
    if not device.startswith("hip"):
        mark = b"GLSL.std.450" if device.startswith("vulkan") else b".target sm_80"
        assert facts is None
        assert mark in (build.folder / MODULE).read_bytes()
    else:
        assert facts["kernels"] > 20
        assert facts["wave"] == (64 if device == "hip:gfx942" else 32)
    read_back(build, build.folder, build.artifact)


def test_a_module_for_another_cpu(lowered: Make) -> None:
    build = lowered("lfm2-untied", four_bit, "mlir", device="cpu:aarch64")
    assert "another CPU" in build.target.why_not_here(build.request)
    code = (build.folder / MODULE).read_bytes()
    machines = {code[m.start() + 18] for m in re.finditer(b"\x7fELF", code)}
    assert machines == {183}  # 64-bit Arm, of ELF
