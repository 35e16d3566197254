"""The target's formats and errors on a machine without Arm's packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError
from lfmc.targets.base import Request, choose_options, get_target
from lfmc.targets.ethos_u import target as target_module
from lfmc.targets.ethos_u import vgf
from lfmc.targets.ethos_u.accelerators import ACCELERATORS


def test_16_bit_values_need_an_accelerator_with_16_bit_products(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    target, config = get_target("ethos-u"), any_checkpoint("lfm2").config
    for name, accelerator in ACCELERATORS.items():
        options = choose_options(target, {"accelerator": name, "activations": "int16"})
        if not accelerator.wide:
            with pytest.raises(UnsupportedError, match="lacks products of two 16-bit values"):
                target.check(config, Request(64, options))


def test_experts_need_8_bit_values(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    target, config = get_target("ethos-u"), any_checkpoint("lfm2_moe").config
    with pytest.raises(UnsupportedError, match="experts require 8-bit scores"):
        target.check(config, Request(64, choose_options(target, {"activations": "int16"})))


def test_doctor_recommends_an_isolated_environment(
    monkeypatch: pytest.MonkeyPatch, any_checkpoint: Callable[[str], Checkpoint]
) -> None:
    monkeypatch.setattr(target_module, "find_spec", lambda name: None)
    target, config = get_target("ethos-u"), any_checkpoint("lfm2").config
    (reason,) = target.missing_tools()["every option"]
    assert "--isolated" in reason
    with pytest.raises(UnsupportedError, match="environment of its own") as error:
        target.check(config, Request(64, choose_options(target, {})))
    assert "--isolated" in str(error.value)


def test_vgf_needs_a_converter_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, any_checkpoint: Callable[[str], Checkpoint]
) -> None:
    monkeypatch.setattr(target_module, "find_spec", lambda name: True)
    monkeypatch.setattr(vgf, "find_spec", lambda name: None)
    monkeypatch.setattr(vgf.shutil, "which", lambda name: None)
    target, config = get_target("ethos-u"), any_checkpoint("lfm2").config
    request = Request(64, choose_options(target, {"vgf": "yes"}))
    with pytest.raises(UnsupportedError, match="needs Arm's model-converter") as error:
        target.check(config, request)
    assert vgf.VARIABLE in str(error.value)
    broken = tmp_path / "model-converter"
    broken.write_text('#!/bin/sh\necho "GLIBC_2.38 not found" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv(vgf.VARIABLE, str(broken))
    with pytest.raises(UnsupportedError, match="does not run here") as error:
        target.check(config, request)
    assert "GLIBC_2.38 not found" in str(error.value)
    broken.write_text("#!/bin/sh\necho model-converter 1.2\n")
    target.check(config, request)
    assert vgf.require_converter() == (broken, "model-converter 1.2")
    with pytest.raises(UnsupportedError, match="rejects the graph"):
        vgf.convert(broken, tmp_path / "decode.tosa", tmp_path / "decode.vgf")


def test_only_8_bit_weights_are_supported(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    formats = get_target("ethos-u").capabilities(any_checkpoint("lfm2_moe").config)
    assert {format.bits for format in (*formats.linear, *formats.embedding, *formats.expert)} == {8}
