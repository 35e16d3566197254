"""Checkpoints of real shapes with random weights, for measurements that depend on size alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lfmc.checkpoint.checkpoint import demo_path
from lfmc.model import build_decoder, read_config

SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "8b": (
        {
            "model_type": "lfm2_moe",
            "num_hidden_layers": 24,
            "intermediate_size": 7168,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1792,
            "num_dense_layers": 2,
        },
        (2, 6, 10, 14, 18, 21),
    ),
    "1.2b": (
        {
            "model_type": "lfm2",
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "block_auto_adjust_ff_dim": False,
        },
        (2, 5, 8, 10, 12, 14),
    ),
    "350m": (
        {
            "model_type": "lfm2",
            "num_hidden_layers": 16,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4608,
            "block_auto_adjust_ff_dim": False,
        },
        (2, 5, 8, 10, 12, 14),
    ),
    "small": (
        {
            "model_type": "lfm2_moe",
            "num_hidden_layers": 3,
            "intermediate_size": 2048,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 512,
            "num_dense_layers": 1,
        },
        (2,),
    ),
}
COMMON = {
    "vocab_size": 65536,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
POOL = 1 << 26  # random numbers that all tensors reuse: they need not be independent


@contextmanager
def checkpoint_of(shape: str, folder: Path | None, *, keep: bool = False) -> Iterator[Path]:
    """Yield a folder with a checkpoint of that shape: the existing `folder`, or a new one.

    A new folder is removed at the end, unless `keep`. If `folder` is None, it is in the temporary
    directory.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"lfmc-{shape}"
    if folder.exists():
        yield folder
        return
    try:
        write_checkpoint(shape, folder)
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


def write_checkpoint(shape: str, folder: Path) -> None:
    """Write a checkpoint of random weights, with one file per layer."""
    changes, attention_layers = SHAPES[shape]
    kinds = ["conv"] * int(changes["num_hidden_layers"])
    for layer in attention_layers:
        kinds[layer] = "full_attention"
    raw = {**COMMON, **changes, "layer_types": kinds}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, folder)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator).bfloat16()
    files: dict[str, dict[str, Tensor]] = {}
    index, total = {}, 0
    for name, value in build_decoder(read_config(raw)).state_dict().items():
        if name.startswith("rope."):
            continue
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = value
        index[name] = f"model-{part}.safetensors"
        total += value.numel()
    for file, tensors in files.items():
        save_file(
            {n: _random_tensor(n, v, pool, generator) for n, v in tensors.items()}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    print(f"{shape}: {total / 1e9:.2f} billion parameters", flush=True)


def _random_tensor(name: str, template: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(template.shape, dtype=torch.bfloat16)
    if name.endswith("expert_bias"):
        return torch.zeros(template.shape)
    count = template.numel()
    offset = int(torch.randint(0, 1 << 20, (), generator=generator))
    copies = -(-(count + offset) // len(pool))
    flat = pool.repeat(copies)[offset : offset + count]
    return (flat * template.shape[-1] ** -0.5).view(template.shape).clone()
