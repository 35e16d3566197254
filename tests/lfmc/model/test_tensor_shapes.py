"""Names and shapes without torch equal those of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model import build_decoder
from lfmc.model.tensor_shapes import tensor_shapes
from tests.conftest import TRAINED
from tests.factories import KINDS


def decoder_shapes(checkpoint: Checkpoint) -> list[tuple[str, tuple[int, ...]]]:
    state = build_decoder(checkpoint.config).state_dict()
    return [(n, tuple(value.shape)) for n, value in state.items() if not n.startswith("rope.")]


@pytest.mark.parametrize("name", [*KINDS, *TRAINED])
def test_shapes_are_those_of_the_decoder_in_its_order(
    any_checkpoint: Callable[[str], Checkpoint], name: str
) -> None:
    checkpoint = any_checkpoint(name)
    assert list(tensor_shapes(checkpoint.config).items()) == decoder_shapes(checkpoint)


def test_a_setting_changes_the_shapes(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    config = any_checkpoint("lfm2").config
    assert "lm_head.weight" not in tensor_shapes(config)
    assert "lm_head.weight" in tensor_shapes(replace(config, tied_embedding=False))
