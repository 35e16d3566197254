"""Tiny random checkpoints, saved by transformers, and the logits of transformers."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lfmc.checkpoint.checkpoint import TOKENIZER_FILES, demo_path
from lfmc.model import Decoder, DecoderConfig, initial_state

_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LFM2 = {
    **_SIZES,
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "block_multiple_of": 32,
}
_MOE = {
    **_SIZES,
    "model_type": "lfm2_moe",
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_LFM3 = {
    **_SIZES,
    "model_type": "lfm3",
    "layer_types": ["conv", "sliding_attention", "full_attention", "conv"],
    "head_dim": 32,
    "sliding_window": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "lfm2": _LFM2,
    "lfm2-conv-bias": {**_LFM2, "conv_bias": True},
    "lfm2-untied": {**_LFM2, "tie_word_embeddings": False},
    "lfm2_moe": _MOE,
    "lfm2_moe-short": {**_MOE, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe-no-bias": {**_MOE, "use_expert_bias": False},
    "lfm2_moe-scaled": {**_MOE, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "lfm3": _LFM3,
    "lfm3-attention-bias": {**_LFM3, "attention_bias": True},
    "lfm3-plain": {**_LFM3, "use_sandwich_norm": False, "use_attention_gate": False},
    "lfm2_vl": {**_LFM2, "vision": "siglip2_vision_model"},
    "lfm3_vl": {**_LFM3, "vision": "lfm3_vl_vision"},
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_patches": 16,
    "patch_size": 4,
}


def save_tiny_checkpoint(folder: Path, kind: str, **overrides: Any) -> Path:
    """Write a random checkpoint of a kind in `KINDS`, with the demo's tokenizer, to `folder`."""
    fields = {**KINDS[kind], **overrides}
    vision = fields.pop("vision", None)
    config = transformers.AutoConfig.for_model(**fields)
    if vision is None:
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModelForImageTextToText.from_config(_vision(kind, config, vision))
    _randomize(model)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (demo_path() / name).is_file():
            shutil.copy(demo_path() / name, folder / name)
    return folder


def _vision(kind: str, text: Any, vision: str) -> Any:
    return transformers.AutoConfig.for_model(
        kind,
        text_config=text.to_dict(),
        vision_config={**_VISION, "model_type": vision},
        projector_hidden_size=16,
    )


def _randomize(model: Any) -> None:
    """Draw weights so that every block affects the logits: none near zero, no norm gain of one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "freq" in name or not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("expert_bias"):
                value.copy_(0.3 * noise)
            elif value.dim() == 1:
                value.copy_(("norm" in name) + 0.3 * noise)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)  # also experts, [E, out, in]


@lru_cache(maxsize=2)
def reference_model(path: Path) -> Any:
    """Return the float32 model of transformers for a checkpoint."""
    kind = transformers.AutoConfig.from_pretrained(path).model_type
    auto = (
        transformers.AutoModelForImageTextToText
        if kind.endswith("_vl")
        else transformers.AutoModelForCausalLM
    )
    return auto.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


def reference_logits(path: Path, tokens: Tensor, chunks: list[int]) -> Tensor:
    """Return logits of transformers `[B, T, V]` for `tokens` `[B, T]`, in chunks over its cache."""
    model, past, logits = reference_model(path), None, []
    with torch.no_grad():
        for piece in tokens.split(chunks, dim=1):
            out = model(input_ids=piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def decoder_logits(
    decoder: Decoder, tokens: Tensor, chunks: list[int], context: int | None = None
) -> Tensor:
    """Return logits of the decoder `[B, T, V]`, from an initial state of `context` slots."""
    state: Any = initial_state(decoder.config, tokens.shape[0], context or tokens.shape[1])
    logits, start = [], 0
    for piece in tokens.split(chunks, dim=1):
        positions = torch.arange(start, start + piece.shape[1])
        out, state = decoder(piece, positions, state)
        logits.append(out)
        start += piece.shape[1]
    return torch.cat(logits, dim=1)


def random_tokens(config: DecoderConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (batch, length), generator=generator)
