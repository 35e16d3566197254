"""What each part of `auto` is worth: the method with one part changed, on text.

`python tests/benchmarks/ablation.py MODEL_DIR... --text FILE.jsonl --bits 3.5` prints one markdown
table of KL(fp32 || quantized) in nats per token; with `--fitting` of the parts of effort "best"
instead. The text is only for measuring, except in the one variant that says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from quality import measure, read_text
from torch import Tensor

from lfmc.calib_free.auto import method as auto
from lfmc.calib_free.auto.sensitivity import Sensitivity
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit import fit
from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Format
from lfmc.calib_free.make_plan import FAST, Budget, Effort, make_plan
from lfmc.calib_free.plan.roles import QUANTIZED, role
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.parity.text_quality import logits_of, windows

GROUP_64 = Capabilities(
    *(tuple(f for f in GENERIC.linear if (f.group, f.symmetric) == (64, False)),) * 3,
    GENERIC.floats,
)


def squared_error(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: object
) -> Iterator[Sensitivity]:
    """In place of the Fisher information: every error counts the same."""
    for name, weight in _weights(decoder):
        yield _even(name, weight, 1.0)


def relative_error(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: object
) -> Iterator[Sensitivity]:
    """In place of the Fisher information: errors relative to a matrix's mean energy."""
    for name, weight in _weights(decoder):
        yield _even(name, weight, 1 / float(weight.square().mean()))


def _weights(decoder: StreamedDecoder) -> Iterator[tuple[str, Tensor]]:
    for name, info in decoder.checkpoint.tensors.items():
        if role(name, info.shape) in QUANTIZED:
            yield name, decoder.checkpoint.load(name).float()


def _even(name: str, weight: Tensor, value: float) -> Sensitivity:
    information = torch.full_like(weight, value)
    return Sensitivity(name, information.sum(0), torch.arange(len(weight)), information)


def all_alike(columns: Tensor) -> Tensor:
    """In place of column importance."""
    return torch.ones_like(columns)


def minmax(number_format: Format, capabilities: Capabilities) -> str:
    """In place of the searched grid."""
    return "minmax"


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "cost: squared error": {"sensitivities": squared_error},
    "cost: relative squared error": {"sensitivities": relative_error},
    "columns all alike in the clip search": {"column_importance": all_alike},
    "min/max grid": {"grid_for": minmax},
    "no excess of large errors": {"EXCESS": 0.0},
    "excess 8": {"EXCESS": 8.0},
    "no sharing within a kind": {"SHARED": 0.0},
    "a quarter of the text": {"TEXTS": 32},
    "four times the text": {"TEXTS": 512},
    "another seed": {"seed": 1},
    "only groups of 64, asymmetric": {"capabilities": GROUP_64},
}


BEST = fit.WORK["best"]


def fitting_variants(tokens: Tensor) -> Mapping[str, Mapping[str, Any]]:
    """The same for effort "best", on what `tokens` `[n, 256]` is measured on."""

    def measured(decoder: StreamedDecoder, count: int, length: int, *rest: object) -> Tensor:
        """In place of text from the model: what is measured on, as often as it takes."""
        pieces = tokens.view(-1, length)
        return pieces.repeat(-(-count // len(pieces)), 1)[:count]

    def first_stage(*given: Any) -> list[tuple[str, fit.Stage, float]]:
        return stages(*given)[:1]

    stages = fit._stages
    longer = replace(BEST.whole, steps=3 * BEST.whole.steps)
    return {
        "as it is": {},
        "block by block only": {"_stages": first_stage},
        "end to end only": {"WORK": {"best": replace(BEST, blocks=None)}},
        "end to end only, three times as long": {
            "WORK": {"best": replace(BEST, blocks=None, whole=longer)}
        },
        "half of the text": {"WORK": {"best": replace(BEST, texts=BEST.texts // 2)}},
        "fitted to the text that is measured on": {"write_texts": measured},
    }


def kl(
    checkpoint: Checkpoint,
    reference: list[Tensor],
    tokens: Tensor,
    budget: float,
    effort: Effort,
    module: ModuleType,
    change: Mapping[str, Any],
) -> float:
    """KL of `auto` with a change: attributes of `module`, a seed, or capabilities."""
    values = dict(change)
    seed, capabilities = values.pop("seed", 0), values.pop("capabilities", GENERIC)
    with patch.multiple(module, **values) if values else nullcontext():
        plan = make_plan(checkpoint, capabilities, "auto", Budget(budget), seed=seed, effort=effort)
    return measure(checkpoint, reference, tokens, plan).kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", required=True, type=Path, help="a .jsonl with `text`, or a .txt")
    parser.add_argument("--bits", default=3.5, type=float)
    parser.add_argument("--length", default=256, type=int, help="tokens a window")
    parser.add_argument("--count", default=32, type=int, help="windows, spread over the text")
    parser.add_argument("--fitting", action="store_true", help='of effort "best"')
    options = parser.parse_args()
    print("| model | bits/weight | variant | KL |\n|---|---|---|---|")
    for model in options.models:
        checkpoint = open_checkpoint(model)
        text = read_text(options.text)
        bos = checkpoint.config.bos_id
        tokens = windows(checkpoint.tokenizer(), text, options.length, options.count, bos)
        with torch.inference_mode():
            reference = list(logits_of(checkpoint.decoder(), tokens))
        variants, module, effort = VARIANTS, auto, FAST
        if options.fitting:
            variants, module, effort = fitting_variants(tokens), fit, Effort("best")
        for name, change in variants.items():
            found = kl(checkpoint, reference, tokens, options.bits, effort, module, change)
            print(f"| {checkpoint.name} | {options.bits} | {name} | {found:.4f} |", flush=True)


if __name__ == "__main__":
    main()
