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
from tests.targets.programs import PROGRAMS, floats, mixed

Make = Callable[..., Lowered]


def assert_right(made: Lowered) -> None:
    assert_matrix(made, made.target.run(made.folder))


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(lowered: Make, name: str, choose: Choose) -> None:
    assert_right(lowered(name, choose, "mlir"))


@pytest.mark.parametrize("dialect", DIALECTS[1:])
def test_matrix_by_way_of_other_dialects(lowered: Make, dialect: str) -> None:
    """What is executed was lowered from the very module that is shipped."""
    made = lowered("lfm3-attention-bias", mixed, "mlir", dialect=dialect)
    assert_right(made)
    code = (made.folder / "model.mlirbc").read_bytes()
    assert code[:4] == b"ML\xefR"
    assert dialect.encode() in code


def test_operators_by_name(lowered: Make) -> None:
    """They are in the module that is shipped, each with a definition, which is what is executed."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    made = lowered("lfm2_moe", mixed, "mlir", dialect="torch", operators="named")
    assert_right(made)
    context = ir.Context()
    torch_dialect.register_dialect(context)
    with context:
        module = ir.Module.parse((made.folder / "model.mlirbc").read_bytes())
    functions = {str(own.attributes["sym_name"]).strip('"'): own for own in module.body.operations}
    asked = open_parameters(made.folder).facts["parameters"]
    held = [operation.operation for operation in functions["decode"].regions[0].blocks[0]]
    found = Counter()
    for operation in (own for own in held if own.name == "torch.operator"):
        form = json.loads(ir.StringAttr(operation.operands[-1].owner.attributes["value"]).value)
        found[str(operation.attributes["name"]).strip('"')] += 1
        definition = functions[form["definition"]]
        assert str(definition.attributes["sym_visibility"]) == '"private"'
        types = [value.type for value in operation.operands][:-1]
        assert [value.type for value in definition.regions[0].blocks[0].arguments] == types
        assert set(form["parameters"]) <= set(asked)
        if "nbits" in form["definition"]:
            assert form["bits"] in (2, 3, 4, 6, 8)
    assert found == {
        "torch.lfm.embedding_nbits": 1,
        "torch.lfm.linear_nbits": 11,
        "torch.lfm.rms_norm": 1,
        "torch.lfm.add_rms_norm": 8,
        "torch.lfm.gated_short_conv": 2,
        "torch.lfm.attention": 2,
        "torch.lfm.swiglu": 1,
        "torch.lfm.moe": 3,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], object], tmp_path: Path, name: str
) -> None:
    made = lower(any_checkpoint(name), four_bit, tmp_path, name="mlir", context=192)  # type: ignore[arg-type]
    assert_right(made)


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_constants_on_disk_are_the_plan(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "mlir")
    errors = read_back(made, made.folder, made.artifact)
    assert set(errors) == {row.name for row in made.plan.rows if row.format.startswith("int")}
    stored = sum(tensor.nbytes for tensor in made.artifact.tensors)
    assert stored <= sum(row.nbytes for row in made.plan.rows)


def test_a_changed_weight_is_found(lowered: Make, tmp_path: Path) -> None:
    made = lowered("lfm2-untied", four_bit, "mlir")
    data = bytearray((made.folder / PARAMETERS).read_bytes())
    data[-2000 - len(data) // 2] ^= 0x10
    (tmp_path / PARAMETERS).write_bytes(data)
    with pytest.raises(GateError, match="on disk are not the plan's"):
        read_back(made, tmp_path, made.artifact)


def test_a_wrong_scale_fails_the_matrix(lowered: Make) -> None:
    """The scales of one matrix 2 % off, in torch."""
    made = lowered("lfm2-untied", four_bit, "mlir")
    name = next(name for name in made.program.weights if name.endswith("w2.scales"))
    held = made.program.module.get_buffer(name)
    right = held.clone()
    try:
        held *= 1.02
        with pytest.raises(AssertionError):
            assert_right(made)
    finally:
        held.copy_(right)


def test_a_prompt_gives_the_logits_of_its_last_token(lowered: Make) -> None:
    made = lowered("lfm2_moe", mixed, "mlir")
    tokens = random_tokens(made.checkpoint.config, 1, 75)[0]  # 64, 8, and one by one
    one, other = made.target.run(made.folder), made.target.run(made.folder)
    found, every = one.prefill(tokens), other.step(tokens)
    assert found.shape == (1, made.checkpoint.config.vocab_size)
    assert torch.allclose(found, every[-1:], atol=1e-5 * float(every.abs().max()))
    assert torch.equal(one.step(tokens[:1]), other.step(tokens[:1]))


def test_conversations_share_nothing(lowered: Make) -> None:
    """States are variables of a module; each stepper has one of its own."""
    made = lowered("lfm3-attention-bias", mixed, "mlir")
    tokens = random_tokens(made.checkpoint.config, 1, 30)[0]
    one, other = made.target.run(made.folder), made.target.run(made.folder)
    one.step(tokens[:9])
    other.step(tokens[20:])
    found = one.step(tokens[9:20])
    other.reset()
    other.step(tokens[:9])
    assert torch.equal(other.step(tokens[9:20]), found)


def test_the_context_is_used_to_its_end_and_no_further(lowered: Make) -> None:
    assert_context_ends(lowered("lfm2-conv-bias", floats, "mlir"))


def test_what_is_no_module_is_refused(lowered: Make, tmp_path: Path) -> None:
    one, other = lowered("lfm2-untied", four_bit, "mlir"), lowered("lfm2_moe", mixed, "mlir")
    shutil.copy(other.folder / PARAMETERS, tmp_path)
    with pytest.raises(InputError, match="there is no module"):
        one.target.run(tmp_path)
    shutil.copy(one.folder / MODULE, tmp_path)
    with pytest.raises(InputError, match="can't load the module"):
        one.target.run(tmp_path)
    (tmp_path / MODULE).unlink()  # it may still be mapped
    (tmp_path / MODULE).write_bytes(b"0" * 5000)
    with pytest.raises(InputError, match="can't load the module"):
        one.target.run(tmp_path)


def test_weights_are_no_part_of_a_module(lowered: Make) -> None:
    """Neither of the shipped one nor of the compiled one: both take them from the parameters."""
    made = lowered("lfm2-untied", four_bit, "mlir")
    name = next(row.name for row in made.plan.rows if row.role == "embedding")
    raw = pack_groups(made.weights.packed((name,)).scales).flatten()[:64].numpy().tobytes()
    assert raw in (made.folder / PARAMETERS).read_bytes()
    assert raw not in (made.folder / MODULE).read_bytes()
    assert raw not in (made.folder / "model.mlirbc").read_bytes()


def test_sizes_that_the_layout_does_not_take_are_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.lowering.request import Options, request

    path = tiny_checkpoint("lfm2", hidden_size=72, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="the hidden size is no multiple of 16"):
        request(open_checkpoint(path), get_target("mlir"), Options(context=32))


GPUS = [name for name, device in DEVICES.items() if not device.is_cpu and name != "vulkan"]


@pytest.mark.parametrize("device", GPUS)
def test_code_for_gpus_is_compiled_and_says_that_it_was_not_run(lowered: Make, device: str) -> None:
    made = lowered("lfm2-untied", four_bit, "mlir", device=device)
    assert made.target.why_not_here(made.asked) is not None
    facts = made.artifact.facts["code_objects"]
    if not device.startswith("hip"):
        mark = b"GLSL.std.450" if device.startswith("vulkan") else b".target sm_80"
        assert facts is None
        assert mark in (made.folder / MODULE).read_bytes()
    else:
        assert facts["kernels"] > 20
        assert facts["wave"] == (64 if device == "hip:gfx942" else 32)
    read_back(made, made.folder, made.artifact)


def test_another_cpu(lowered: Make) -> None:
    made = lowered("lfm2-untied", four_bit, "mlir", device="cpu:aarch64")
    assert "another CPU" in made.target.why_not_here(made.asked)
    code = (made.folder / MODULE).read_bytes()
    machines = {code[m.start() + 18] for m in re.finditer(b"\x7fELF", code)}
    assert machines == {183}  # 64-bit Arm, of ELF
