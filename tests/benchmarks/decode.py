"""Tokens per second of artifacts, transformers and llama.cpp, in interleaved rounds.

`python tests/benchmarks/decode.py [MODEL]` exports MODEL (the bundled checkpoint by default; with
`--shape`, random weights of that shape) to each of `--targets` (`executorch:logits=last` takes
options), then times the bundles, transformers' eager float32, and with `--llama` llama.cpp's Q4_0
in turn, each in a process of its own: threads of one would keep those of another waiting. It prints
the best and the median round of each, and the median's ratio to the last. A machine that does other
work gives other numbers: compare within one run only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama import LlamaStepper, write_q4_0
from shapes import SHAPES, checkpoint_of

import lfmc
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.parity.transformers_reference import TransformersStepper
from lfmc.run.stepper import Stepper
from lfmc.run.timing import time_round

Times = list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of MODEL")
    parser.add_argument("--targets", default="onnx", help="a list with commas")
    parser.add_argument("--bits", default="uniform")
    parser.add_argument("--bits-per-weight", type=float, help="a budget")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", action="store_true", help="needs llama-cpp-python and gguf")
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run is not None:
        _answer(SIDES[asked.run](asked.model, asked.context))
        return
    with _model(asked) as model, tempfile.TemporaryDirectory() as folder:
        sides = dict(_sides(asked, model, Path(folder)))
        times: dict[str, Times] = {name: [] for name in sides}
        for _ in range(asked.rounds):
            for name, side in sides.items():
                times[name].append(_round(side, asked.prompt, asked.tokens))
        for side in sides.values():
            side.communicate()
    _print(asked, times)


def _bundle(path: str, context: int) -> Stepper:
    return lfmc.load(path)


def _llama(path: str, context: int) -> Stepper:
    return LlamaStepper(Path(path), context)


def _transformers(path: str, context: int) -> Stepper:
    return TransformersStepper(open_checkpoint(path))


SIDES = {"bundle": _bundle, "llama": _llama, "transformers": _transformers}


def _answer(side: Stepper) -> None:
    """Time a round for each line of stdin, `[prompt, tokens]`."""
    for line in sys.stdin:
        print(json.dumps(time_round(side, *json.loads(line))), flush=True)


def _start(asked: argparse.Namespace, kind: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(path), "--run", kind, "--context", str(asked.context)]
    side = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    _round(side, asked.prompt, 4)  # warms up
    return side


def _round(side: subprocess.Popen[str], prompt: int, tokens: int) -> tuple[float, float]:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write(json.dumps([prompt, tokens]) + "\n")
    side.stdin.flush()
    prefill, decode = json.loads(side.stdout.readline())
    return prefill, decode


@contextmanager
def _model(asked: argparse.Namespace) -> Iterator[Checkpoint]:
    if asked.shape is None:
        yield open_checkpoint(asked.model)
        return
    with checkpoint_of(asked.shape, None) as path:
        yield open_checkpoint(path)


def _sides(
    asked: argparse.Namespace, checkpoint: Checkpoint, folder: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    for index, name in enumerate(asked.targets.split(",")):
        target, *options = name.split(":")
        bundle = lfmc.export(
            checkpoint.path,
            target=target,
            bits=asked.bits,
            bits_per_weight=asked.bits_per_weight,
            context=asked.context,
            output=folder / str(index),
            check="off",
            target_options=dict(option.split("=") for option in options),
        )
        title = f"lfmc {name}, {bundle.nbytes / 1e6:.1f} MB"
        yield title, _start(asked, "bundle", bundle.path)
    if asked.llama:
        path = write_q4_0(checkpoint, folder)
        title = f"llama.cpp Q4_0, {path.stat().st_size / 1e6:.1f} MB"
        yield title, _start(asked, "llama", path)
    else:
        title = "transformers eager, float32"
        yield title, _start(asked, "transformers", checkpoint.path)


def _print(asked: argparse.Namespace, times: dict[str, Times]) -> None:
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
