"""What rounding every value by a static step costs, in torch: KL on texts that the model writes.

    python tests/benchmarks/static_steps.py MODEL [MODEL ...] [--texts 4]

Weights have 8 bits, one scale a row, on both sides: only values differ. Steps are found on other
texts than those that are judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from lfmc.calib_free.auto.sampled_text import write_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.make_plan import make_plan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.lowering.build import build
from lfmc.machine.progress import Silent
from lfmc.targets.base import Request, get_target
from lfmc.targets.npu.bound_constants import Bound
from lfmc.targets.npu.forms import BY_TAPS, Style
from lfmc.targets.npu.lowering import LENGTH, NpuLowering
from lfmc.targets.npu.names import multiplies
from lfmc.targets.npu.static_ranges import every, none, rounding, torch_stepper

JUDGED_SEED = 1


@dataclass(frozen=True)
class Way:
    name: str
    bits: int
    style: Style
    balanced: Callable[[str], bool]


WAYS = (
    Way("qualcomm int16", 16, BY_TAPS, multiplies),
    Way("qualcomm int8", 8, BY_TAPS, none),
    Way("ethos-u int16", 16, Style(by_taps=True, by_parts=True), every),
    Way("ethos-u int8", 8, Style(by_taps=True, by_parts=True), none),
)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats a token, of logits `[T, V]`."""
    own, other = expected.log_softmax(-1), found.log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1).mean())


def judge(checkpoint: Checkpoint, count: int) -> dict[str, tuple[float, float]]:
    """KL and top-1 agreement of every way."""
    target = get_target("qualcomm")
    plan = make_plan(checkpoint, target.capabilities(checkpoint.config), "8", None)
    asked = Request(LENGTH, {})
    made, _ = build(checkpoint, target, plan, asked, Silent())
    made.bind()
    decoder = StreamedDecoder(checkpoint)
    texts = write_texts(decoder, count, LENGTH, JUDGED_SEED, lambda part: None)
    bound, found = Bound(made.program), {}
    for way in WAYS:
        own = NpuLowering(
            made.program, made.weights, LENGTH, LENGTH, way.bits, way.style, way.balanced
        )

        def logits(keep: Callable[[Tensor, str], Tensor], own: NpuLowering = own) -> Tensor:
            parts = []
            args = made.program, own.interface, [LENGTH], bound, bound.embed(own.embedding), keep
            stepper = torch_stepper(*args, own.style)
            for text in texts:
                stepper.reset()
                parts.append(stepper.step(text))
            return torch.cat(parts)

        plain, rounded = logits(lambda value, name: value), logits(rounding(own.steps))
        agree = float((plain.argmax(-1) == rounded.argmax(-1)).float().mean())
        found[way.name] = divergence(plain, rounded), agree
    return found


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--texts", default=4, show_default=True)
def main(models: tuple[Path, ...], texts: int) -> None:
    for model in models:
        for name, (kl, agree) in judge(open_checkpoint(str(model)), texts).items():
            print(f"{model.name} {name}: KL {kl:.5f}, top-1 {agree:.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
