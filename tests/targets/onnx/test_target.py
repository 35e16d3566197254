"""Capabilities: the formats that the allocator may choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lfmc.calib_free.make_plan import make_plan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.targets.base import get_target


def test_groups_of_tables_and_experts_are_whole() -> None:
    target = get_target("onnx")
    config = open_checkpoint().config
    assert {f.group for f in target.capabilities(config).expert} == {32, 64, 128}
    assert config.moe is not None
    narrow = replace(config, hidden_size=96, moe=replace(config.moe, ffn_size=64))
    capabilities = target.capabilities(narrow)
    assert {f.group for f in capabilities.embedding} == {32}
    assert {f.group for f in capabilities.expert} == {32}
    assert {f.group for f in capabilities.linear} == {32, 64, 128}


def test_a_size_that_no_format_fits_is_refused(
    any_checkpoint: Callable[..., Checkpoint], tiny_checkpoint: Callable[..., object]
) -> None:
    odd = open_checkpoint(tiny_checkpoint("lfm2_moe", moe_intermediate_size=24))  # type: ignore[arg-type]
    capabilities = get_target("onnx").capabilities(odd.config)
    with pytest.raises(UnsupportedError, match="no integer format for expert weights"):
        make_plan(odd, capabilities, "4", None)
    assert make_plan(odd, capabilities, "none", None).rows


def test_an_unknown_target_error_lists_the_targets() -> None:
    with pytest.raises(InputError, match="no such target") as error:
        get_target("abacus")
    assert "onnx" in str(error.value)
