"""The configuration file that onnxruntime-genai (0.18) needs to load a folder."""

from __future__ import annotations

import json
from typing import Any

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.sampling import read_sampling
from lfmc.model.config import CONV
from lfmc.targets.onnx.emitter import MODEL_FILE

SEARCH_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")
CONFIG_FILE = "genai_config.json"


def genai_config(checkpoint: Checkpoint, context: int) -> str:
    """Return the text of `genai_config.json` for a model in the `genai` layout."""
    config = checkpoint.config
    model: dict[str, Any] = {
        "bos_token_id": config.bos_id,
        "context_length": context,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL_FILE,
            "head_size": config.head_dim,
            "hidden_size": config.hidden_size,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
                "past_conv_names": "past.%d.conv",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
                "present_conv_names": "present.%d.conv",
            },
            "num_attention_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "num_key_value_heads": config.num_kv_heads,
            "layer_types": list(config.layer_types),
            "conv_cache_size": config.conv_kernel - 1 if CONV in config.layer_types else 0,
        },
        "eos_token_id": list(checkpoint.stop_ids),
        "pad_token_id": config.pad_id if config.pad_id is not None else checkpoint.stop_ids[0],
        "type": config.model_type,
        "vocab_size": config.vocab_size,
    }
    sampling = read_sampling(checkpoint.path)
    search: dict[str, Any] = {
        "do_sample": sampling.get("temperature", 0) > 0,
        "max_length": context,
        "past_present_share_buffer": True,
        # genai has no min_p, and divides by the temperature also without sampling
        **{key: sampling[key] for key in SEARCH_SETTINGS if sampling.get(key)},
    }
    return json.dumps({"model": model, "search": search}, indent=2) + "\n"


def read_token_ids(text: str) -> dict[str, Any]:
    """Return the token ids in the text that `genai_config` wrote."""
    model = json.loads(text)["model"]
    names = {"bos": "bos_token_id", "pad": "pad_token_id", "stop": "eos_token_id"}
    return {role: model[name] for role, name in names.items()}
