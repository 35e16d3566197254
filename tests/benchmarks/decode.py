"""Tokens per second of an artifact against transformers, in interleaved rounds.

`python tests/benchmarks/decode.py [MODEL]` exports MODEL (the bundled checkpoint by default) to
ONNX at 4.5 bits per weight, `uniform`, then times it and transformers' eager float32 in turn. It
prints the best and the median round of each, and their ratio. A machine that does other work gives
other numbers: compare within one run only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import lfmc
from lfmc.checkpoint import open_checkpoint
from lfmc.reference import TransformersStepper
from lfmc.stepping import Stepper
from lfmc.timing import time_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder")
    parser.add_argument("--bits", default="uniform")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        bundle = lfmc.export(asked.model, bits=asked.bits, output=path, check="off")
        sides: dict[str, Stepper] = {
            f"lfmc onnx, {bundle.nbytes / 1e6:.1f} MB": lfmc.load(bundle.path),
            "transformers eager, float32": TransformersStepper(checkpoint),
        }
        for side in sides.values():
            time_round(side, asked.prompt, 4)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(asked.rounds):
            for name, side in sides.items():
                times[name].append(time_round(side, asked.prompt, asked.tokens))
    _print(checkpoint.name, asked, times)


def _print(
    model: str, asked: argparse.Namespace, times: dict[str, list[tuple[float, float]]]
) -> None:
    print(f"{model}: {asked.rounds} interleaved rounds; tokens/s, best (median)\n")
    print("| engine | prefill | decode | x transformers, decode |")
    print("|---|---|---|---|")
    slow = statistics.median(seconds for _, seconds in list(times.values())[-1])
    for name, rounds in times.items():
        prefill, decode = zip(*rounds, strict=True)
        middle = statistics.median(decode)
        print(
            f"| {name} | {asked.prompt / min(prefill):.0f} "
            f"({asked.prompt / statistics.median(prefill):.0f}) "
            f"| {asked.tokens / min(decode):.0f} ({asked.tokens / middle:.0f}) "
            f"| {slow / middle:.2f} |"
        )


if __name__ == "__main__":
    main()
