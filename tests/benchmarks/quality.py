"""Methods against each other, on text.

`python tests/benchmarks/quality.py MODEL_DIR... --text FILE.jsonl --bits 2.5,3,3.5,4.5` prints one
markdown table; without arguments, of the bundled checkpoint on the bundled passages. The text is
only for measuring: no plan ever sees it. A method is one of lfmc's, with an effort behind a colon
(`auto:best`), or one of `rivals.py`, which have one size each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import torch
from rivals import rival_weights
from torch import Tensor

from lfmc.calib_free.allocate.resources import ALONE, Resources
from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.grid.formats import GENERIC, Capabilities
from lfmc.calib_free.make_plan import FAST, Budget, Effort, make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.checkpoint.checkpoint import Checkpoint, demo_path, open_checkpoint
from lfmc.errors import LfmcError
from lfmc.machine.cache import default_cache
from lfmc.model import DecoderConfig
from lfmc.parity.text_quality import Quality, QualityMeter, logits_of, windows

PASSAGES = Path(str(files("lfmc") / "data" / "passages.txt"))
COLUMNS = "model | method | budget | actual bits/weight | KL | top-1 | perplexity | plan, s"


def read_text(path: Path) -> str:
    """The text of a file: lines of JSON with a `text` each, or plain."""
    raw = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return raw
    return "\n\n".join(json.loads(line)["text"] for line in raw.splitlines() if line)


def capabilities_of(target: str, config: DecoderConfig) -> Capabilities:
    """What a target stores, or the generic capabilities."""
    if target == "generic":
        return GENERIC
    from lfmc.targets.base import get_target

    return get_target(target).capabilities(config)


def measure(
    checkpoint: Checkpoint, reference: list[Tensor], tokens: Tensor, plan: BitPlan
) -> Quality:
    """Quality of the weights of a plan against the reference logits."""
    return measure_weights(checkpoint, reference, tokens, dequantized_weights(checkpoint, plan))


def measure_weights(
    checkpoint: Checkpoint, reference: list[Tensor], tokens: Tensor, weights: Mapping[str, Tensor]
) -> Quality:
    """Quality of any weights against the reference logits."""
    decoder = checkpoint.decoder(weights)
    meter = QualityMeter()
    with torch.inference_mode():
        parts = zip(reference, logits_of(decoder, tokens), tokens.split(8), strict=True)
        for wide, narrow, part in parts:
            meter.add(wide, narrow, part)
    return meter.result()


def table(options: argparse.Namespace) -> Iterator[str]:
    """Lines of the table, one as soon as it is known."""
    text = read_text(options.text)
    yield f"| {COLUMNS} |"
    yield "|" + "---|" * len(COLUMNS.split("|"))
    for model in options.models:
        checkpoint = open_checkpoint(model)
        bos = checkpoint.config.bos_id
        tokens = windows(checkpoint.tokenizer(), text, options.length, options.count, bos)
        with torch.inference_mode():
            reference = list(logits_of(checkpoint.decoder(), tokens))
        for method in options.rivals:
            yield rival_row(checkpoint, reference, tokens, method)
        for budget in options.bits:
            for method in options.methods:
                yield row(checkpoint, reference, tokens, method, budget, options)


def rival_row(checkpoint: Checkpoint, reference: list[Tensor], tokens: Tensor, name: str) -> str:
    """One line: a rival at the one size that it has."""
    start = time.perf_counter()
    bits, weights = rival_weights(checkpoint, name)
    seconds = time.perf_counter() - start
    found = measure_weights(checkpoint, reference, tokens, weights)
    return _line(checkpoint, name, "-", bits, found, seconds)


def _line(
    checkpoint: Checkpoint, method: str, budget: str, bits: float, found: Quality, seconds: float
) -> str:
    return (
        f"| {checkpoint.name} | {method} | {budget} | {bits:.4f} | {found.kl:.4f} "
        f"| {found.top1:.3f} | {found.perplexity:.2f} (fp32 {found.reference_perplexity:.2f}) "
        f"| {seconds:.0f} |"
    )


def row(
    checkpoint: Checkpoint,
    reference: list[Tensor],
    tokens: Tensor,
    method: str,
    budget: float,
    options: argparse.Namespace,
) -> str:
    """One line: a method at one budget, or why it refused."""
    start = time.perf_counter()
    name, _, level = method.partition(":")
    try:
        capabilities = capabilities_of(options.target, checkpoint.config)
        plan = make_plan(
            checkpoint,
            capabilities,
            name,
            Budget(budget),
            target=options.target,
            seed=options.seed,
            effort=(
                Effort(level, options.minutes, options.device, options.gpus) if level else FAST
            ),
            alphaq=AlphaQOptions(gamma=options.gamma) if name == "alphaq" else None,
            resources=Resources(cache=default_cache()) if options.cache else ALONE,
        )
    except LfmcError as error:
        return f"| {checkpoint.name} | {method} | {budget} | refused: {error.what} | | | | |"
    seconds = time.perf_counter() - start
    check_plan(plan, checkpoint, capabilities)
    found = measure(checkpoint, reference, tokens, plan)
    return _line(checkpoint, method, str(budget), plan.bits_per_weight, found, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[demo_path()], type=Path)
    parser.add_argument(
        "--text", default=PASSAGES, type=Path, help="a .jsonl with `text`, or a .txt"
    )
    parser.add_argument(
        "--bits", default=[2.5, 3.0, 3.5, 4.5], type=lambda s: [float(b) for b in s.split(",")]
    )
    parser.add_argument(
        "--methods", default=["auto", "alphaq", "uniform"], type=lambda s: s.split(",")
    )
    parser.add_argument("--rivals", default=[], type=lambda s: s.split(","))
    parser.add_argument("--minutes", type=float, help="bound of each fitting")
    parser.add_argument("--device", default="cpu", help="where to fit")
    parser.add_argument("--gpus", default=1, type=int, help="to share what is learned end to end")
    parser.add_argument(
        "--cache", action="store_true", help="reuse what was measured before; seconds count less"
    )
    parser.add_argument("--target", default="generic")
    parser.add_argument("--seed", default=0, type=int, help="of what the model samples")
    parser.add_argument("--gamma", default=1.0, type=float)
    parser.add_argument("--length", default=256, type=int, help="tokens a window")
    parser.add_argument("--count", type=int, help="windows, spread over the text")
    options = parser.parse_args()
    if options.count is None:
        options.count = 7 if options.text == PASSAGES else 32
    for line in table(options):
        print(line, flush=True)
    tokens = options.count * options.length
    print(f"\nKL(fp32 || quantized) in nats per token, on {tokens} tokens of {options.text}.")


if __name__ == "__main__":
    sys.exit(main())
