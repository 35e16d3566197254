"""Checkpoints as other programs save them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.checkpoint.weight_files import SINGLE
from lfmc.errors import InputError


@pytest.fixture(params=["lfm2", "lfm2_moe", "lfm3", "lfm2_vl"])
def folder(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> Path:
    """A copy of a tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint(request.param), tmp_path / "model"))


def values(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder).weights)


def test_tensors_of_a_state_dict(folder: Path) -> None:
    """transformers 5 stores all experts of a layer as packed tensors in memory."""
    expected = values(folder)
    auto = transformers.AutoModelForCausalLM
    if folder.joinpath("config.json").read_text().count("vision_config"):
        auto = transformers.AutoModelForImageTextToText
    state = auto.from_pretrained(folder).state_dict()
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / SINGLE)
    actual = values(folder)
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_tensors_without_the_prefix(folder: Path) -> None:
    expected = values(folder)
    stored = {k.removeprefix("model."): v for k, v in load_file(folder / SINGLE).items()}
    save_file(stored, folder / SINGLE)
    actual = values(folder)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_unused_tensors_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(open_checkpoint(folder).tensors)
    assert not caplog.text
    stored = load_file(folder / SINGLE)
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    stored["v_head.summary.weight"] = torch.ones(1, 64)
    stored["v_head.steps"] = torch.ones(1, dtype=torch.int64)
    save_file(stored, folder / SINGLE)
    assert list(open_checkpoint(folder).tensors) == expected
    assert "v_head.summary.weight" in caplog.text
    assert "rotary_emb.inv_freq" in caplog.text


def test_other_tensors_of_a_layer_are_refused(folder: Path) -> None:
    stored = load_file(folder / SINGLE)
    stored["model.layers.1.self_attn.sinks"] = torch.ones(4)
    save_file(stored, folder / SINGLE)
    with pytest.raises(InputError, match="sinks"):
        open_checkpoint(folder)
