"""Compare tokens per second of artifacts, transformers and llama.cpp in interleaved rounds.

`python tests/benchmarks/decode.py [MODEL]` exports MODEL (the bundled checkpoint by default; with
`--shape`, random weights of that shape) to each of `--targets` (`executorch:logits=last` takes
options), then times the bundles and transformers' eager float32, or with `--llama` llama.cpp's
Q4_0, in turn. Each runs in a separate process, because the threads of one engine would slow down
those of another. The output is the best and the median round of each engine, and the median's ratio
to the last engine. Other work on the machine changes the numbers: compare within one run only.
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
from lfmc.run.stepper import Stepper
from lfmc.run.timing import time_round
from tests.benchmarks.transformers_stepper import TransformersStepper

Times = list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of MODEL")
    parser.add_argument("--targets", default="onnx", help="comma-separated")
    parser.add_argument("--bits", default="uniform")
    parser.add_argument("--bits-per-weight", type=float, help="a budget")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", action="store_true", help="needs llama-cpp-python and gguf")
    parser.add_argument("--run", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        _serve(ENGINES[options.run](options.model, options.context))
        return
    with _model(options) as model, tempfile.TemporaryDirectory() as folder:
        engines = dict(_start_engines(options, model, Path(folder)))
        times: dict[str, Times] = {name: [] for name in engines}
        for _ in range(options.rounds):
            for name, engine in engines.items():
                times[name].append(_time_round(engine, options.prompt, options.tokens))
        for engine in engines.values():
            engine.communicate()
    _print(options, times)


def _bundle(path: str, context: int) -> Stepper:
    return lfmc.load(path)


def _llama(path: str, context: int) -> Stepper:
    return LlamaStepper(Path(path), context)


def _transformers(path: str, context: int) -> Stepper:
    return TransformersStepper(Path(path))


ENGINES = {"bundle": _bundle, "llama": _llama, "transformers": _transformers}


def _serve(stepper: Stepper) -> None:
    """Time a round for each line of stdin, `[prompt, tokens]`, and print its times."""
    for line in sys.stdin:
        print(json.dumps(time_round(stepper, *json.loads(line))), flush=True)


def _start(options: argparse.Namespace, kind: str, path: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        __file__,
        str(path),
        "--run",
        kind,
        "--context",
        str(options.context),
    ]
    engine = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    _time_round(engine, options.prompt, 4)  # warm-up
    return engine


def _time_round(engine: subprocess.Popen[str], prompt: int, tokens: int) -> tuple[float, float]:
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write(json.dumps([prompt, tokens]) + "\n")
    engine.stdin.flush()
    prefill, decode = json.loads(engine.stdout.readline())
    return prefill, decode


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[Checkpoint]:
    if options.shape is None:
        yield open_checkpoint(options.model)
        return
    with checkpoint_of(options.shape, None) as path:
        yield open_checkpoint(path)


def _start_engines(
    options: argparse.Namespace, checkpoint: Checkpoint, folder: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    for index, name in enumerate(options.targets.split(",")):
        target, *target_options = name.split(":")
        bundle = lfmc.export(
            checkpoint.path,
            target=target,
            bits=options.bits,
            bits_per_weight=options.bits_per_weight,
            context=options.context,
            output=folder / str(index),
            check="off",
            target_options=dict(option.split("=") for option in target_options),
        )
        title = f"lfmc {name}, {bundle.nbytes / 1e6:.1f} MB"
        yield title, _start(options, "bundle", bundle.path)
    if options.llama:
        path = write_q4_0(checkpoint, folder)
        title = f"llama.cpp Q4_0, {path.stat().st_size / 1e6:.1f} MB"
        yield title, _start(options, "llama", path)
    else:
        title = "transformers eager, float32"
        yield title, _start(options, "transformers", checkpoint.path)


def _print(options: argparse.Namespace, times: dict[str, Times]) -> None:
    print(f"{options.rounds} interleaved rounds; tokens/s, best (median); x: ratio to the last\n")
    print("| engine | prefill | decode | prefill, x | decode, x |")
    print("|---|---|---|---|---|")
    base = [statistics.median(seconds) for seconds in zip(*list(times.values())[-1], strict=True)]
    for name, rounds in times.items():
        cells = []
        for count, seconds in zip(
            (options.prompt, options.tokens), zip(*rounds, strict=True), strict=True
        ):
            median = statistics.median(seconds)
            cells.append((f"{count / min(seconds):.0f} ({count / median:.0f})", median))
        ratios = [f"{last / median:.2f}" for last, (_, median) in zip(base, cells, strict=True)]
        print(f"| {name} | " + " | ".join([*(text for text, _ in cells), *ratios]) + " |")


if __name__ == "__main__":
    main()
