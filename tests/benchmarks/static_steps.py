"""Measure the KL of activations with static scales, in torch, on text sampled from the model.

    python tests/benchmarks/static_steps.py MODEL [MODEL ...] [--texts 4]

Reference and test both use 8-bit weights with one scale a row: only the activations differ. The
scales are observed on other texts than those that KL is measured on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from lfmc.calib_free.auto.sampled_text import sample_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.make_plan import make_plan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.lowering.build import build
from lfmc.machine.progress import Silent
from lfmc.targets.base import Request, get_target
from lfmc.targets.npu.bound_constants import BoundConstants
from lfmc.targets.npu.forms import BY_TAPS, Style
from lfmc.targets.npu.lowering import LENGTH, NpuLowering
from lfmc.targets.npu.names import is_second_operand
from lfmc.targets.npu.static_ranges import (
    all_values,
    no_values,
    round_to_steps,
    torch_stepper,
)

EVALUATION_SEED = 1


@dataclass(frozen=True)
class Scheme:
    name: str
    bits: int
    style: Style
    is_symmetric: Callable[[str], bool]


SCHEMES = (
    Scheme("qualcomm int16", 16, BY_TAPS, is_second_operand),
    Scheme("qualcomm int8", 8, BY_TAPS, no_values),
    Scheme("ethos-u int16", 16, Style(by_taps=True, by_parts=True), all_values),
    Scheme("ethos-u int8", 8, Style(by_taps=True, by_parts=True), no_values),
)


def mean_kl(expected: Tensor, actual: Tensor) -> float:
    """Return the mean KL(expected || actual) of logits `[T, V]`, in nats a token."""
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def evaluate(checkpoint: Checkpoint, count: int) -> dict[str, tuple[float, float]]:
    """Return the KL and the top-1 agreement of each scheme, by name."""
    target = get_target("qualcomm")
    plan = make_plan(checkpoint, target.capabilities(checkpoint.config), "8", None)
    request = Request(LENGTH, {})
    artifact_build, _ = build(checkpoint, target, plan, request, Silent())
    program, weights = artifact_build.program, artifact_build.weights
    decoder = StreamedDecoder(checkpoint)
    texts = sample_texts(decoder, count, LENGTH, EVALUATION_SEED, lambda message: None)
    constants, results = BoundConstants(program), {}
    for scheme in SCHEMES:
        lowering = NpuLowering(
            program, weights, LENGTH, LENGTH, scheme.bits, scheme.style, scheme.is_symmetric
        )

        def logits(
            round_value: Callable[[Tensor, str], Tensor], lowering: NpuLowering = lowering
        ) -> Tensor:
            parts = []
            embed = constants.embedding(lowering.embedding)
            args = program, lowering.interface, [LENGTH], constants, embed, round_value
            stepper = torch_stepper(*args, lowering.style)
            for text in texts:
                stepper.reset()
                parts.append(stepper.step(text))
            return torch.cat(parts)

        expected, actual = logits(lambda value, name: value), logits(round_to_steps(lowering.steps))
        agreement = float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
        results[scheme.name] = mean_kl(expected, actual), agreement
    return results


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--texts", default=4, show_default=True)
def main(models: tuple[Path, ...], texts: int) -> None:
    for model in models:
        for name, (kl, agreement) in evaluate(open_checkpoint(str(model)), texts).items():
            print(f"{model.name} {name}: KL {kl:.5f}, top-1 {agreement:.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
