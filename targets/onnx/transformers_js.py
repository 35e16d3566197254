"""The settings that transformers.js (4.3) reads from the JSON files of a model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfmc.checkpoint.chat_template import DEFAULT, read_templates
from lfmc.checkpoint.checkpoint import Checkpoint

# The kernel counts the tokens of each expert with atomic additions. One workgroup sets the counts
# to 0 while the others may already add (onnxruntime-web 1.31.0-dev.20260914, `QmoeGate`).
NOT_ON_WEBGPU = (
    "experts can't run on WebGPU: QMoE of transformers.js 4.3 has a data race in prompts of more "
    "than one token, and returns wrong results at random; use wasm, or Node"
)


def settings(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, Any]]:
    """Return, by file name, the keys that replace or extend those of the checkpoint's files.

    `transformers.js_config` names the files: `fp32` is the type whose files have no suffix, and the
    data are in one external file. Without it, a browser would load `model_quantized.onnx`.
    transformers.js reads the chat template only from `tokenizer_config.json`. The stop tokens of
    `generation_config.json` replace those of `config.json` there, so it gets the tokens of both.
    """
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    templates = read_templates(checkpoint.path)
    if templates:
        tokenizer["chat_template"] = templates[DEFAULT]
    return {
        "config.json": {
            **_text_config(checkpoint),
            "layer_types": list(checkpoint.config.layer_types),
            "transformers.js_config": {"dtype": "fp32", "use_external_data_format": True},
        },
        "generation_config.json": {"eos_token_id": list(checkpoint.stop_ids)},
        "tokenizer_config.json": tokenizer,
    }


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the keys that make a vision-language configuration one of its language tower."""
    text = checkpoint.raw_config.get("text_config")
    if text is None:
        return {}
    model_type = checkpoint.config.model_type
    name = "".join(part.capitalize() for part in model_type.split("_"))
    # In a vision-language model, the outer setting of a tied embedding applies.
    keys = {key: value for key, value in text.items() if key != "tie_word_embeddings"}
    return {**keys, "model_type": model_type, "architectures": [f"{name}ForCausalLM"]}
