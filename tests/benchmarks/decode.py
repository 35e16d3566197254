"""Tokens per second of artifacts, transformers and llama.cpp, in interleaved rounds.

`python tests/benchmarks/decode.py [MODEL]` exports MODEL (the bundled checkpoint by default; with
`--shape`, random weights of that shape) to each of `--targets`, then times the bundles,
transformers' eager float32, and with `--llama` llama.cpp's Q4_0 in turn. It prints the best and the
median round of each, and the median's ratio to the last. A machine that does other work gives other
numbers: compare within one run only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama import LlamaStepper, write_q4_0
from shapes import SHAPES, checkpoint_of

import lfmc
from lfmc.checkpoint import Checkpoint, open_checkpoint
from lfmc.reference import TransformersStepper
from lfmc.stepping import Stepper
from lfmc.timing import time_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of MODEL")
    parser.add_argument("--targets", default="onnx", help="a list with commas")
    parser.add_argument("--bits", default="uniform")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", action="store_true", help="needs llama-cpp-python and gguf")
    asked = parser.parse_args()
    with _model(asked) as model, tempfile.TemporaryDirectory() as folder:
        sides = dict(_sides(asked, model, Path(folder)))
        for side in sides.values():
            time_round(side, asked.prompt, 4)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(asked.rounds):
            for name, side in sides.items():
                times[name].append(time_round(side, asked.prompt, asked.tokens))
    _print(asked, times)


@contextmanager
def _model(asked: argparse.Namespace) -> Iterator[Checkpoint]:
    if asked.shape is None:
        yield open_checkpoint(asked.model)
        return
    with checkpoint_of(asked.shape, None) as path:
        yield open_checkpoint(path)


def _sides(
    asked: argparse.Namespace, checkpoint: Checkpoint, folder: Path
) -> Iterator[tuple[str, Stepper]]:
    for target in asked.targets.split(","):
        bundle = lfmc.export(
            checkpoint.path,
            target=target,
            bits=asked.bits,
            context=asked.context,
            output=folder / target,
            check="off",
        )
        yield f"lfmc {target}, {bundle.nbytes / 1e6:.1f} MB", lfmc.load(bundle.path)
    if asked.llama:
        path = write_q4_0(checkpoint, folder)
        name = f"llama.cpp Q4_0, {path.stat().st_size / 1e6:.1f} MB"
        yield name, LlamaStepper(path, asked.context)
    else:
        yield "transformers eager, float32", TransformersStepper(checkpoint)


def _print(asked: argparse.Namespace, times: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{asked.rounds} interleaved rounds; tokens/s, best (median), times the last\n")
    print("| engine | prefill | decode | prefill, x | decode, x |")
    print("|---|---|---|---|---|")
    base = [statistics.median(seconds) for seconds in zip(*list(times.values())[-1], strict=True)]
    for name, rounds in times.items():
        cells = []
        for count, seconds in zip(
            (asked.prompt, asked.tokens), zip(*rounds, strict=True), strict=True
        ):
            middle = statistics.median(seconds)
            cells.append((f"{count / min(seconds):.0f} ({count / middle:.0f})", middle))
        ratios = [f"{own / middle:.2f}" for own, (_, middle) in zip(base, cells, strict=True)]
        print(f"| {name} | " + " | ".join([*(text for text, _ in cells), *ratios]) + " |")


if __name__ == "__main__":
    main()
