"""Compare the TVM target's prefill of any length with functions of fixed lengths.

`python tests/benchmarks/lengths.py` compiles a checkpoint (random weights of LFM2-350M's shape by
default) with prefill functions of fixed lengths in addition to the standard one, whose length is
known only at the call. It times each pair on the same number of tokens, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from shapes import SHAPES, checkpoint_of

from lfmc.calib_free.make_plan import make_plan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.lowering.build import build
from lfmc.lowering.request import Options, make_request
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from lfmc.targets.tvm import lower
from lfmc.targets.tvm.relax_function import FunctionSpec
from lfmc.targets.tvm.runtime import LIBRARY, TvmStepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="350m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with checkpoint_of(options.shape, None) as path, tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(path)
        fixed = tuple(FunctionSpec(f"prefill_{n}", n, last_only=True) for n in options.lengths)
        sizes = {}
        for kinds in (lower.FUNCTIONS, (*fixed, *lower.FUNCTIONS)):
            start, artifact = time.perf_counter(), Path(folder) / str(len(kinds))
            with patch.object(lower, "FUNCTIONS", kinds):
                stepper = compile_stepper(checkpoint, max(options.lengths), artifact)
            seconds = time.perf_counter() - start
            sizes[artifact.name] = (artifact / LIBRARY).stat().st_size, seconds
        runs: dict[tuple[int, str], Callable[[], object]] = {}
        for kind in fixed:
            ids = torch.randint(checkpoint.config.vocab_size, (kind.tokens or 0,)).int()
            runs[len(ids), "any"] = lambda ids=ids: stepper.prefill(ids)
            function = stepper.machine[kind.name]
            runs[len(ids), "fixed"] = lambda ids=ids, f=function: stepper._call(f, ids)
        times = time_rounds(runs, stepper, options.rounds)
    for name, (nbytes, seconds) in sizes.items():
        print(f"{name} functions: {nbytes / 1e3:.0f} kB, {seconds:.0f} s")
    print("\n| tokens | any length, ms: best (median) | fixed, ms | fixed / any, median |")
    print("|---|---|---|---|")
    for length in options.lengths:
        dynamic, fixed_ms = ([1000 * s for s in times[length, kind]] for kind in ("any", "fixed"))
        columns = dynamic, fixed_ms
        cells = " | ".join(f"{min(t):.1f} ({statistics.median(t):.1f})" for t in columns)
        ratio = statistics.median(b / a for a, b in zip(dynamic, fixed_ms, strict=True))
        print(f"| {length} | {cells} | {ratio:.3f} |")


def compile_stepper(checkpoint: Checkpoint, chunk: int, folder: Path) -> TvmStepper:
    """Compile the checkpoint at 4 bits and return its stepper."""
    target = get_target("tvm")
    options = Options(bits="4", context=1024, target_options={"chunk": str(chunk)})
    request = make_request(checkpoint, target, options)
    plan = make_plan(checkpoint, target.capabilities(checkpoint.config), "4", None)
    artifact_build, _ = build(checkpoint, target, plan, request, Silent())
    folder.mkdir()
    artifact_build.lower(folder)
    return TvmStepper(folder)


def time_rounds(
    runs: dict[tuple[int, str], Callable[[], object]], stepper: TvmStepper, rounds: int
) -> dict[tuple[int, str], list[float]]:
    """Return the seconds of each run in each round."""
    times: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    for index in range(rounds + 1):
        for key, run in runs.items():
            stepper.reset()
            start = time.perf_counter()
            run()
            if index:  # the first round is a warm-up
                times[key].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
