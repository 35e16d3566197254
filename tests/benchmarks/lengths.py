"""What it costs that the TVM target's prefill takes any number of tokens.

`python tests/benchmarks/lengths.py` compiles a checkpoint (random weights of LFM2-350M's shape by
default) with functions of fixed lengths beside the one that ships, whose length is known at the
call, and times each on that many tokens, in turn.
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
from lfmc.lowering.request import Options, request
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from lfmc.targets.tvm import lower
from lfmc.targets.tvm.relax_function import Kind
from lfmc.targets.tvm.runtime import LIBRARY, TvmStepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="350m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    with checkpoint_of(asked.shape, None) as path, tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(path)
        fixed = tuple(Kind(f"prefill_{n}", n, last_only=True) for n in asked.lengths)
        sizes = {}
        for kinds in (lower.KINDS, (*fixed, *lower.KINDS)):
            begun, own = time.perf_counter(), Path(folder) / str(len(kinds))
            with patch.object(lower, "KINDS", kinds):
                stepper = compiled(checkpoint, max(asked.lengths), own)
            sizes[own.name] = (own / LIBRARY).stat().st_size, time.perf_counter() - begun
        runs: dict[tuple[int, str], Callable[[], object]] = {}
        for kind in fixed:
            ids = torch.randint(checkpoint.config.vocab_size, (kind.tokens or 0,)).int()
            runs[len(ids), "any"] = lambda ids=ids: stepper.prefill(ids)
            function = stepper.machine[kind.name]
            runs[len(ids), "fixed"] = lambda ids=ids, f=function: stepper._call(f, ids)
        times = rounds_of(runs, stepper, asked.rounds)
    for name, (nbytes, seconds) in sizes.items():
        print(f"{name} functions: {nbytes / 1e3:.0f} kB, {seconds:.0f} s")
    print("\n| tokens | any length, ms: best (median) | fixed, ms | fixed / any, median |")
    print("|---|---|---|---|")
    for length in asked.lengths:
        own, other = ([1000 * s for s in times[length, kind]] for kind in ("any", "fixed"))
        cells = " | ".join(f"{min(t):.1f} ({statistics.median(t):.1f})" for t in (own, other))
        ratio = statistics.median(b / a for a, b in zip(own, other, strict=True))
        print(f"| {length} | {cells} | {ratio:.3f} |")


def compiled(checkpoint: Checkpoint, chunk: int, folder: Path) -> TvmStepper:
    """The checkpoint at 4 bits, running."""
    target = get_target("tvm")
    options = Options(bits="4", context=1024, target_options={"chunk": str(chunk)})
    asked = request(checkpoint, target, options)
    plan = make_plan(checkpoint, target.capabilities(checkpoint.config), "4", None)
    made, _ = build(checkpoint, target, plan, asked, Silent())
    folder.mkdir()
    made.lower(folder)
    return TvmStepper(folder)


def rounds_of(
    runs: dict[tuple[int, str], Callable[[], object]], stepper: TvmStepper, rounds: int
) -> dict[tuple[int, str], list[float]]:
    times: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    for index in range(rounds + 1):
        for key, run in runs.items():
            stepper.reset()
            begun = time.perf_counter()
            run()
            if index:  # the first round warms up
                times[key].append(time.perf_counter() - begun)
    return times


if __name__ == "__main__":
    main()
