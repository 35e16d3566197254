"""Ablation of method `auto`: measure KL with one part of the method changed.

`python tests/benchmarks/ablation.py MODEL_DIR... --text FILE.jsonl --bits 3.5` prints a markdown
table of KL(fp32 || quantized) in nats per token. `--fitting` changes parts of effort "best"
instead. Only the variant "fitted to the evaluation text" uses the text for anything but measuring.
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
from quality import measure_plan, read_text
from torch import Tensor

from lfmc.calib_free.auto import method as auto
from lfmc.calib_free.auto.sensitivity import Sensitivity
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit import fit
from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Format
from lfmc.calib_free.make_plan import FAST, Budget, Effort, make_plan
from lfmc.calib_free.plan.roles import QUANTIZED_ROLES, tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.parity.text_quality import logits_of, windows

GROUP_64 = Capabilities(
    *(tuple(f for f in GENERIC.linear if (f.group, f.symmetric) == (64, False)),) * 3,
    GENERIC.floats,
)


def squared_error(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: object, **options: object
) -> Iterator[list[Sensitivity]]:
    """Replace the Fisher information: all errors have the same weight."""
    for name, weight in _weights(decoder):
        yield [_uniform_sensitivity(name, weight, 1.0)]


def relative_error(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: object, **options: object
) -> Iterator[list[Sensitivity]]:
    """Replace the Fisher information: weight errors by the inverse mean energy of the matrix."""
    for name, weight in _weights(decoder):
        yield [_uniform_sensitivity(name, weight, 1 / float(weight.square().mean()))]


def _weights(decoder: StreamedDecoder) -> Iterator[tuple[str, Tensor]]:
    for name, info in decoder.checkpoint.tensors.items():
        if tensor_role(name, info.shape) in QUANTIZED_ROLES:
            yield name, decoder.checkpoint.load(name).float()


def _uniform_sensitivity(name: str, weight: Tensor, value: float) -> Sensitivity:
    information = torch.full_like(weight, value)
    return Sensitivity(name, information.sum(0), torch.arange(len(weight)), information)


def equal_columns(columns: Tensor) -> Tensor:
    """Replace the column importance: all columns have the same."""
    return torch.ones_like(columns)


def minmax(number_format: Format, capabilities: Capabilities) -> str:
    """Replace the grid search."""
    return "minmax"


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "unchanged": {},
    "cost: squared error": {"compute_sensitivities": squared_error},
    "cost: relative squared error": {"compute_sensitivities": relative_error},
    "equal column weights in the clip search": {"column_importance": equal_columns},
    "min/max grid": {"grid_for": minmax},
    "no excess cost of large errors": {"EXCESS": 0.0},
    "excess 8": {"EXCESS": 8.0},
    "no shrinkage within a kind": {"SHRINKAGE": 0.0},
    "a quarter of the text": {"TEXTS": 32},
    "four times the text": {"TEXTS": 512},
    "another seed": {"seed": 1},
    "only groups of 64, asymmetric": {"capabilities": GROUP_64},
}

BEST = fit.RECIPES["best"]


def fitting_variants(tokens: Tensor) -> Mapping[str, Mapping[str, Any]]:
    """Return the variants of effort "best"; KL is measured on `tokens` `[n, 256]`."""

    def evaluation_text(decoder: StreamedDecoder, count: int, length: int, *_: object) -> Tensor:
        """Replace the sampled text by the evaluation text, repeated to `count` texts."""
        pieces = tokens.view(-1, length)
        return pieces.repeat(-(-count // len(pieces)), 1)[:count]

    def first_stage(*arguments: Any) -> list[tuple[str, fit.Stage, float]]:
        return stages(*arguments)[:1]

    stages = fit._stages
    longer = replace(BEST.end_to_end, steps=3 * BEST.end_to_end.steps)
    return {
        "unchanged": {},
        "block by block only": {"_stages": first_stage},
        "end to end only": {"RECIPES": {"best": replace(BEST, blockwise=None)}},
        "end to end only, three times as long": {
            "RECIPES": {"best": replace(BEST, blockwise=None, end_to_end=longer)}
        },
        "half of the text": {"RECIPES": {"best": replace(BEST, texts=BEST.texts // 2)}},
        "fitted to the evaluation text": {"sample_texts": evaluation_text},
    }


def measure_kl(
    checkpoint: Checkpoint,
    reference: list[Tensor],
    tokens: Tensor,
    budget: float,
    effort: Effort,
    module: ModuleType,
    change: Mapping[str, Any],
) -> float:
    """Return the KL of `auto` with a change of `module`'s attributes, the seed or capabilities."""
    values = dict(change)
    seed, capabilities = values.pop("seed", 0), values.pop("capabilities", GENERIC)
    with patch.multiple(module, **values) if values else nullcontext():
        plan = make_plan(checkpoint, capabilities, "auto", Budget(budget), seed=seed, effort=effort)
    return measure_plan(checkpoint, reference, tokens, plan).kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", required=True, type=Path, help="a .jsonl with `text`, or a .txt")
    parser.add_argument("--bits", default=3.5, type=float)
    parser.add_argument("--length", default=256, type=int, help="tokens a window")
    parser.add_argument("--count", default=32, type=int, help="windows, spread over the text")
    parser.add_argument("--fitting", action="store_true", help='change parts of effort "best"')
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
            kl = measure_kl(checkpoint, reference, tokens, options.bits, effort, module, change)
            print(f"| {checkpoint.name} | {options.bits} | {name} | {kl:.4f} |", flush=True)


if __name__ == "__main__":
    main()
