"""Fixtures of small checkpoints: the one that ships with lfmc, and tiny random ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.model import build_decoder, read_config

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_L_cache": 3,
    "intermediate_size": 48,
    "block_auto_adjust_ff_dim": False,
    "bos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return open_checkpoint()


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Return a function that writes a random checkpoint.

    Example: `make_checkpoint("lfm2_moe", tie_word_embeddings=False)`.
    """

    def make(model_type: str = "lfm2_moe", **changes: object) -> Checkpoint:
        raw = {**TINY, "model_type": model_type, **changes}
        if model_type == "lfm2_moe":
            raw = {**raw, **EXPERTS, "num_dense_layers": 1, **changes}
        folder = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for name, value in build_decoder(read_config(raw)).state_dict().items():
            if name.startswith("rope."):
                continue
            random = torch.randn(value.shape, generator=generator) * 0.3
            random = 1 + 0.1 * random if "norm" in name else random
            tensors[name] = random if name.endswith("expert_bias") else random.bfloat16()
        save_file(tensors, folder / "model.safetensors")
        return open_checkpoint(folder)

    return make
