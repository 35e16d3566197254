"""Measure AutoRound on a dense LFM, for the table of rivals.

It needs a separate environment: `pip install auto-round==0.16.1 transformers==5.23.0`, and lfmc.
`python tests/benchmarks/autoround.py MODEL --text TEXT.jsonl --bits 4 --group 32` tunes the
projections on text sampled from the model, quantizes the embedding like the rival of the same bit
width (AutoRound does not quantize it), and prints the KL on the text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from quality import measure_weights, read_text
from rivals import RIVALS
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.lfm2 import modeling_lfm2

from lfmc.calib_free.auto.sampled_text import sample_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.parity.text_quality import logits_of, windows

EMBEDDING = "model.embed_tokens.weight"
TEXTS, LENGTH = 128, 128


def without_padding_mask(attention: type[torch.nn.Module]) -> None:
    """Patch an attention class to ignore a padding mask.

    AutoRound passes the inputs of the first block to every block. These include a convolution's
    mask `[B, T]`, which attention can't read. Without this mask attention is causal, as it should
    be.
    """
    forward = attention.forward

    def patched(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            kwargs["attention_mask"] = None
        return forward(self, *args, **kwargs)

    attention.forward = patched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--bits", default=4, type=int, choices=(2, 3, 4))
    parser.add_argument("--group", default=32, type=int)
    parser.add_argument("--steps", default=200, type=int, help="steps per block")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    bos = checkpoint.config.bos_id
    tokens = windows(checkpoint.tokenizer(), read_text(options.text), 256, 32, bos)
    with torch.inference_mode():
        reference = list(logits_of(checkpoint.decoder(), tokens))
    stream = StreamedDecoder(checkpoint)
    texts = sample_texts(stream, TEXTS, LENGTH, 0, lambda message: None, TEXTS // 2)
    without_padding_mask(modeling_lfm2.Lfm2Attention)
    start = time.perf_counter()
    tuned = AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group,
        sym=options.bits >= 4,
        iters=options.steps,
        nsamples=TEXTS,
        seqlen=LENGTH,
        batch_size=8,
        dataset=[{"input_ids": text[None]} for text in texts],
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    ).quantize()[0]
    seconds = time.perf_counter() - start
    state = tuned.state_dict()
    weights = {name: state[name].float() for name in checkpoint.tensors}
    rival = {4: "q4_0", 3: "hqq3", 2: "hqq2"}[options.bits]
    weights[EMBEDDING] = RIVALS[rival][1](checkpoint.load(EMBEDDING).float())
    quality = measure_weights(checkpoint, reference, tokens, weights)
    print(
        f"AutoRound, {options.bits} bits in groups of {options.group}, the embedding as {rival}: "
        f"KL {quality.kl:.4f}, top-1 {quality.top1:.3f}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
