"""llama.cpp as a rival in the benchmarks: a dense LFM2 checkpoint as Q4_0, run through the C API.

It needs `pip install llama-cpp-python gguf`, which builds llama.cpp. No other benchmark needs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.embedding_norm.weight": "token_embd_norm.weight",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
}


def write_q4_0(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the checkpoint as a Q4_0 file into `folder` with llama.cpp's own quantizer."""
    import gguf
    import llama_cpp

    config = checkpoint.config
    f16_path, path = folder / "f16.gguf", folder / "q4_0.gguf"
    writer = gguf.GGUFWriter(str(f16_path), "lfm2")
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    heads = [0 if kind == "conv" else config.num_kv_heads for kind in config.layer_types]
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope["full_attention"].theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_shortconv_l_cache(config.conv_kernel)
    writer.add_tokenizer_model("none")
    for name in checkpoint.tensors:
        value = checkpoint.load(name).float().squeeze()
        value = value if value.dim() == 1 or "conv.conv" in name else value.half()
        writer.add_tensor(_gguf_name(name), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.nthread = 2
    failed = llama_cpp.llama_model_quantize(
        str(f16_path).encode(), str(path).encode(), ctypes.byref(params)
    )
    if failed:
        raise SystemExit("llama.cpp could not quantize the checkpoint")
    f16_path.unlink()
    return path


def _gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


class LlamaStepper:
    """One conversation on a model file; computes logits of the last token only, as apps do."""

    def __init__(self, path: Path, context: int, threads: int = 2) -> None:
        import llama_cpp

        self._api, self.context = llama_cpp, context
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp could not load the model")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def reset(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1).tolist()
        token_array = (ctypes.c_int32 * len(ids))(*ids)
        batch = self._api.llama_batch_get_one(token_array, len(ids))
        if self._api.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not run a step")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (1, self._vocab)).copy())


SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)
