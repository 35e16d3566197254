"""LoRA adapters as peft saves them, merged into a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lfmc.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.checkpoint.tensor_names import EMBEDDING, HEAD
from lfmc.errors import InputError
from lfmc.reference.transformers_model import LayerwiseTransformers
from lfmc.run.conversation import Conversation
from lfmc.run.stepper import decoder_stepper

RANK = 4
PREFIX = "base_model.model."
LINEAR = "model.layers.0.conv.in_proj"
OTHER = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("lfm2")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def low_rank(module: str, rows: int, columns: int, rank: int = RANK) -> dict[str, Tensor]:
    """Return the tensors of one adapted linear layer `[rows, columns]`."""
    return {
        f"{PREFIX}{module}.lora_A.weight": noise(rank, columns),
        f"{PREFIX}{module}.lora_B.weight": noise(rows, rank, seed=1),
    }


def embedding(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": noise(RANK, rows),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": noise(columns, RANK, seed=1),
    }


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", **settings}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS)
    return folder


def assert_like_the_adapted_model(checkpoint: Checkpoint, differs_from: Path) -> None:
    """Compare merged weights with transformers, which adds the products to activations."""
    tokens = torch.arange(3, 23)
    actual = decoder_stepper(checkpoint.decoder(), 32).step(tokens)
    (expected,) = LayerwiseTransformers(checkpoint).run([Conversation((tokens,))])
    torch.testing.assert_close(actual, expected.logits, rtol=1e-4, atol=1e-4)
    plain = decoder_stepper(open_checkpoint(differs_from).decoder(), 32).step(tokens)
    assert float((actual - plain).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"in_proj": 16}}, 4.0),
        ({"alpha_pattern": {"q_proj": 16}}, 2.0),
    ],
)
def test_a_linear_layer(base: Path, tmp_path: Path, settings: Any, scale: float) -> None:
    tensors = low_rank(LINEAR, 192, 64)
    folder = save_adapter(tmp_path / "adapter", tensors, **settings)
    checkpoint = open_checkpoint(base, folder)
    a, b = (tensors[f"{PREFIX}{LINEAR}.lora_{side}.weight"] for side in "AB")
    expected = open_checkpoint(base).load(f"{LINEAR}.weight") + scale * b @ a
    torch.testing.assert_close(checkpoint.load(f"{LINEAR}.weight"), expected)
    assert checkpoint.fingerprint != open_checkpoint(base).fingerprint
    assert_like_the_adapted_model(checkpoint, base)


def test_ranks_by_pattern(base: Path, tmp_path: Path) -> None:
    tensors = {**low_rank(LINEAR, 192, 64), **low_rank(OTHER, 64, 64, rank=2)}
    folder = save_adapter(tmp_path / "adapter", tensors, rank_pattern={".*q_proj": 2})
    checkpoint = open_checkpoint(base, folder)
    assert checkpoint.tensors[f"{OTHER}.weight"].adapter.scale == 4.0
    assert_like_the_adapted_model(checkpoint, base)
    with pytest.raises(InputError, match="another rank"):
        open_checkpoint(base, save_adapter(tmp_path / "wrong", tensors))


@pytest.mark.parametrize("kind", ["lfm2", "lfm2-untied", "lfm3"])
@pytest.mark.parametrize("part", ["embedding", "head", "both"])
def test_embedding_and_head(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, part: str
) -> None:
    """An adapter of a tied matrix changes only the side that it names, so both are stored."""
    base = tiny_checkpoint(kind)
    tensors = {
        **(embedding(8192, 64) if part != "head" else {}),
        **(low_rank("lm_head", 8192, 64) if part != "embedding" else {}),
    }
    checkpoint = open_checkpoint(base, save_adapter(tmp_path / "adapter", tensors))
    assert not checkpoint.config.tied_embedding
    assert not checkpoint.raw_config["tie_word_embeddings"]
    assert {EMBEDDING, HEAD} <= checkpoint.tensors.keys()
    assert_like_the_adapted_model(checkpoint, base)


@pytest.mark.parametrize("both", [True, False])
def test_a_tied_adapter_changes_both_sides(base: Path, tmp_path: Path, both: bool) -> None:
    tensors = embedding(8192, 64)
    if both:  # peft stores the adapter of the head, too: the same product, transposed
        side_a, side_b = (value.T.contiguous() for value in tensors.values())
        names = [f"{PREFIX}lm_head.lora_{side}.weight" for side in "AB"]
        tensors |= dict(zip(names, (side_b, side_a), strict=True))
    folder = save_adapter(tmp_path / "adapter", tensors, ensure_weight_tying=True)
    checkpoint = open_checkpoint(base, folder)
    assert checkpoint.config.tied_embedding
    assert_like_the_adapted_model(checkpoint, base)


def test_an_embedding_that_is_stored_with_its_adapter(base: Path, tmp_path: Path) -> None:
    table = noise(8192, 64, seed=2)
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    checkpoint = open_checkpoint(
        base, save_adapter(tmp_path / "a", {name: table, **embedding(8192, 64)})
    )
    product = checkpoint.tensors[EMBEDDING].adapter.values()
    torch.testing.assert_close(checkpoint.load(EMBEDDING), table + product)
    assert torch.equal(checkpoint.load(HEAD), open_checkpoint(base).load(EMBEDDING))
    assert_like_the_adapted_model(checkpoint, base)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.modules_to_save.default.weight"])
def test_whole_weights(base: Path, tmp_path: Path, name: str) -> None:
    head = noise(8192, 64)
    checkpoint = open_checkpoint(base, save_adapter(tmp_path / "a", {PREFIX + name: head}))
    assert torch.equal(checkpoint.load(HEAD), head)
    assert_like_the_adapted_model(checkpoint, base)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (low_rank("model.layers.9.conv.in_proj", 192, 64), {}, "does not have"),
        (low_rank(LINEAR, 100, 64), {}, "another shape"),
        (low_rank("model.layers.1.feed_forward.experts.0.w1", 32, 64), {}, "experts"),
        ({f"{PREFIX}{LINEAR}.lora_A.weight": noise(4, 64)}, {}, "not a pair"),
        ({f"{PREFIX}{LINEAR}.lora_magnitude_vector": noise(4)}, {}, "can't be merged"),
        (low_rank(LINEAR, 192, 64), {"use_dora": True}, "use_dora"),
        (low_rank(LINEAR, 192, 64), {"bias": "all"}, "bias"),
        (low_rank(LINEAR, 192, 64), {"peft_type": "IA3"}, "IA3"),
    ],
)
def test_other_adapters_are_refused(
    base: Path, tmp_path: Path, tensors: Any, settings: Any, message: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(InputError, match=message):
        open_checkpoint(base, folder)


def test_an_adapter_that_is_not_an_option_is_named(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(
        tmp_path / "adapter", low_rank(LINEAR, 192, 64), base_model_name_or_path="org/base"
    )
    with pytest.raises(InputError, match="lfmc export org/base --adapter"):
        open_checkpoint(folder)
    beside = Path(shutil.copytree(base, tmp_path / "beside"))
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(folder / name, beside)
    with pytest.raises(InputError, match="beside the weights"):
        open_checkpoint(beside)
    assert open_checkpoint(beside, beside).adapter == beside


def test_a_folder_without_an_adapter(base: Path) -> None:
    with pytest.raises(InputError, match="contains no LoRA adapter"):
        open_checkpoint(base, base)
