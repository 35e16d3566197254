"""The stated memory of an export."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.targets.base import get_target


@pytest.mark.parametrize("name", ["onnx", "executorch", "tvm", "mlir"])
def test_the_memory_of_a_streaming_target_does_not_depend_on_the_depth(name: str) -> None:
    config, target = open_checkpoint(demo_path()).config, get_target(name)
    deep = replace(config, layer_types=1000 * config.layer_types)
    nbytes = target.export_nbytes(config, is_float=False)
    assert target.export_nbytes(deep, is_float=False) == nbytes
    large = replace(config, vocab_size=1000 * config.vocab_size)
    assert target.export_nbytes(large, is_float=False) > nbytes


@pytest.mark.parametrize("name", ["coreml", "qualcomm", "ethos-u"])
def test_the_memory_of_other_targets_grows_with_the_model(name: str) -> None:
    config, target = open_checkpoint(demo_path()).config, get_target(name)
    large = replace(config, vocab_size=1000 * config.vocab_size)
    assert target.export_nbytes(large, is_float=False) > 10 * config.vocab_size
    assert target.export_nbytes(config, is_float=True) >= target.export_nbytes(
        config, is_float=False
    )
