"""The stepper: calls that it supports, and calls that it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.errors import InputError
from lfmc.targets.onnx.emitter import MODEL_FILE
from lfmc.targets.onnx.runtime import OnnxStepper
from tests.factories import random_tokens
from tests.targets.lowering import Lowered, mixed

Make = Callable[..., Lowered]


@pytest.fixture
def folder(lowered: Make) -> Path:
    return lowered("lfm2-moe-8m", mixed).folder


def test_reset_clears_the_states(folder: Path) -> None:
    stepper = OnnxStepper(folder)
    first = stepper.step([1, 5, 9])
    stepper.step([7, 7])
    stepper.reset()
    torch.testing.assert_close(stepper.step([1, 5, 9]), first, atol=0, rtol=0)


def test_logits_are_float32_of_every_token(folder: Path) -> None:
    logits = OnnxStepper(folder).step(torch.tensor([3, 4, 5, 6]))
    assert logits.dtype == torch.float32
    assert logits.shape == (4, 8192)


def test_the_whole_context_can_be_used_and_no_more(folder: Path) -> None:
    stepper = OnnxStepper(folder)
    tokens = random_tokens_of(stepper.context)
    stepper.step(tokens[:-1])
    stepper.step(tokens[-1:])
    with pytest.raises(InputError, match="longer than the exported context"):
        stepper.step([1])


def random_tokens_of(count: int) -> torch.Tensor:
    return torch.randint(8192, (count,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [[8192], [-1], [5, 100_000]])
def test_ids_outside_of_the_vocabulary_are_refused(folder: Path, tokens: list[int]) -> None:
    with pytest.raises(InputError, match="outside of the vocabulary"):
        OnnxStepper(folder).step(tokens)


def test_no_tokens_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="at least one token"):
        OnnxStepper(folder).step([])


def test_a_batch_continues_one_token_at_a_time(folder: Path, lowered: Make) -> None:
    tokens = random_tokens(lowered("lfm2-moe-8m", mixed).checkpoint.config, 2, 6)
    stepper = OnnxStepper(folder, batch=2)
    stepper.step(tokens[:, :3])
    with pytest.raises(InputError, match="one token at a time"):
        stepper.step(tokens[:, 3:])


def test_a_broken_model_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    model = tmp_path / "copy" / MODEL_FILE
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(InputError, match="can't load the model"):
        OnnxStepper(tmp_path / "copy")
