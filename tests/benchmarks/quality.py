"""Compare the quality of methods on text.

`python tests/benchmarks/quality.py MODEL_DIR... --text FILE.jsonl --bits 2.5,3,3.5,4.5` prints one
markdown table. Without arguments it measures the bundled checkpoint on the bundled passages. The
text is only for measuring: no plan uses it. A method is one of lfmc's, with an optional effort
after a colon (`auto:best`), or one of `rivals.py`, each of which has a single size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch
from rivals import rival_weights
from torch import Tensor

from lfmc.calib_free.allocate.resources import LOCAL, Resources
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
    """Return the text of a file: `text` of each JSON line of a .jsonl, else the whole file."""
    raw = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return raw
    return "\n\n".join(json.loads(line)["text"] for line in raw.splitlines() if line)


def capabilities_of(target: str, config: DecoderConfig) -> Capabilities:
    """Return the capabilities of a target, or the generic ones."""
    if target == "generic":
        return GENERIC
    from lfmc.targets.base import get_target

    return get_target(target).capabilities(config)


def measure_plan(
    checkpoint: Checkpoint, reference: list[Tensor], tokens: Tensor, plan: BitPlan
) -> Quality:
    """Return the quality of a plan's weights compared with the reference logits."""
    return measure_weights(checkpoint, reference, tokens, dequantized_weights(checkpoint, plan))


def measure_weights(
    checkpoint: Checkpoint, reference: list[Tensor], tokens: Tensor, weights: Mapping[str, Tensor]
) -> Quality:
    """Return the quality of any weights compared with the reference logits."""
    decoder = checkpoint.decoder(weights)
    meter = QualityMeter()
    with torch.inference_mode():
        parts = zip(reference, logits_of(decoder, tokens), tokens.split(8), strict=True)
        for reference_logits, logits, window in parts:
            meter.add(reference_logits, logits, window)
    return meter.result()


@dataclass(frozen=True)
class Row:
    """One line of the table; `budget` is None for a rival, which has a single size."""

    model: str
    method: str
    budget: float | None
    bits_per_weight: float
    quality: Quality
    seconds: float

    @property
    def line(self) -> str:
        budget = "-" if self.budget is None else self.budget
        quality = self.quality
        return (
            f"| {self.model} | {self.method} | {budget} | {self.bits_per_weight:.4f} "
            f"| {quality.kl:.4f} | {quality.top1:.3f} "
            f"| {quality.perplexity:.2f} (fp32 {quality.reference_perplexity:.2f}) "
            f"| {self.seconds:.0f} |"
        )


@dataclass(frozen=True)
class Refusal:
    """A method that raised an error at this budget."""

    model: str
    method: str
    budget: float
    error: str

    @property
    def line(self) -> str:
        return f"| {self.model} | {self.method} | {self.budget} | refused: {self.error} | | | | |"


def table_rows(options: argparse.Namespace) -> Iterator[Row | Refusal]:
    """Yield the rows of the table, each as soon as it is measured."""
    text = read_text(options.text)
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
                yield method_row(checkpoint, reference, tokens, method, budget, options)


def rival_row(checkpoint: Checkpoint, reference: list[Tensor], tokens: Tensor, name: str) -> Row:
    """Return the row of a rival at its single size."""
    start = time.perf_counter()
    bits, weights = rival_weights(checkpoint, name)
    seconds = time.perf_counter() - start
    quality = measure_weights(checkpoint, reference, tokens, weights)
    return Row(checkpoint.name, name, None, bits, quality, seconds)


def method_row(
    checkpoint: Checkpoint,
    reference: list[Tensor],
    tokens: Tensor,
    method: str,
    budget: float,
    options: argparse.Namespace,
) -> Row | Refusal:
    """Return the row of a method at one budget, or the error that it raised."""
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
            resources=Resources(cache=default_cache()) if options.cache else LOCAL,
        )
    except LfmcError as error:
        return Refusal(checkpoint.name, method, budget, error.what)
    seconds = time.perf_counter() - start
    check_plan(plan, checkpoint, capabilities)
    quality = measure_plan(checkpoint, reference, tokens, plan)
    return Row(checkpoint.name, method, budget, plan.bits_per_weight, quality, seconds)


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
    parser.add_argument("--minutes", type=float, help="time limit of each fitting")
    parser.add_argument("--device", default="cpu", help="device for fitting")
    parser.add_argument(
        "--gpus", default=1, type=int, help="GPUs that share the end-to-end fitting"
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="reuse earlier measurements; planning times are then shorter",
    )
    parser.add_argument("--target", default="generic")
    parser.add_argument("--seed", default=0, type=int, help="seed of the sampled text")
    parser.add_argument("--gamma", default=1.0, type=float)
    parser.add_argument("--length", default=256, type=int, help="tokens per window")
    parser.add_argument("--count", type=int, help="windows, spread over the text")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.count is None:
        options.count = 7 if options.text == PASSAGES else 32
    print(f"| {COLUMNS} |\n|" + "---|" * len(COLUMNS.split("|")))
    rows = []
    for row in table_rows(options):
        print(row.line, flush=True)
        rows.append(asdict(row))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    tokens = options.count * options.length
    print(f"\nKL(fp32 || quantized) in nats per token, on {tokens} tokens of {options.text}.")


if __name__ == "__main__":
    sys.exit(main())
