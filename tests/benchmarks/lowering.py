"""Measure the seconds of each stage and the peak memory of lowering, and count operators.

`python tests/benchmarks/lowering.py --shape 350m --target coreml` writes a checkpoint of that shape
with random bf16 weights (under --folder; removed at the end unless it existed before). It quantizes
and lowers the checkpoint in a separate process, without parity. It also prints the number of
operators in the graph before and after fusion.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shapes import SHAPES, checkpoint_of

from lfmc.calib_free.grid.formats import parse_format
from lfmc.calib_free.make_plan import make_plan
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program, operator_name
from lfmc.graph.trace import trace
from lfmc.lowering.request import Options, make_request
from lfmc.passes.base import apply
from lfmc.passes.pipeline import pipeline
from lfmc.targets.base import get_target


def child(options: argparse.Namespace) -> None:
    """Plan, trace, fuse and lower; print a line for each stage."""
    checkpoint, target = open_checkpoint(options.folder), get_target(options.target)
    target_options = dict(option.split("=", 1) for option in options.option)
    request = make_request(
        checkpoint, target, Options(context=options.context, target_options=target_options)
    )
    lap_start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal lap_start
        now = time.perf_counter()
        print(f"{name}: {now - lap_start:.1f} s, peak {_peak():.2f} GiB", flush=True)
        lap_start = now

    capabilities = target.capabilities(checkpoint.config)
    plan = make_plan(checkpoint, capabilities, options.bits, None, target=target.name)
    lap(f"plan ({options.bits} bits)")
    program = trace(checkpoint.config, target.trace_spec(checkpoint.config, request))
    before = histogram(program)
    lap("trace")
    apply(pipeline({row.name: parse_format(row.format) for row in plan.rows}), program)
    lap("passes")
    if options.import_only:
        _import(program, PlannedWeights(checkpoint, plan))
        lap("import to linalg")
        return
    artifact = Path(tempfile.mkdtemp(dir=options.folder))
    lowered = target.lower(program, PlannedWeights(checkpoint, plan), request, artifact)
    lap("quantize and lower")
    nbytes = sum((artifact / name).stat().st_size for name in lowered.files)
    print(f"{nbytes:,} bytes on disk, plan: {plan.nbytes:,}")
    for title, counts in (("before", before), ("after", histogram(program))):
        print(f"\n{sum(counts.values())} operators {title} fusion")
        for name, count in counts.most_common(16):
            print(f"  {name:<28} {count:>5}  {'#' * max(1, count * 60 // max(counts.values()))}")


def _import(program: Program, weights: PlannedWeights) -> None:
    """Import the program to MLIR; the target reads no weights in this stage."""
    from lfmc.targets.mlir.devices import DEVICES, HOST
    from lfmc.targets.mlir.lower import Lowering

    Lowering(program, weights, 64, "linalg", DEVICES[HOST]).module()


def histogram(program: Program) -> Counter[str]:
    """Count the calls of each operator."""
    nodes = program.graph.nodes
    return Counter(operator_name(node) for node in nodes if node.op == "call_function")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--target", default="coreml")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("-O", "--option", action="append", default=[], help="NAME=VALUE")
    parser.add_argument("--folder", type=Path, help="of the checkpoint")
    parser.add_argument("--import-only", action="store_true", help="mlir: stop after torch-mlir")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with checkpoint_of(options.shape, options.folder) as options.folder:
        flags = ("child", "import_only", "option")
        arguments = [
            f"--{name}={value}" for name, value in vars(options).items() if name not in flags
        ]
        arguments += [f"--option={option}" for option in options.option]
        arguments += ["--import-only"] if options.import_only else []
        subprocess.run([sys.executable, __file__, "--child", *arguments], check=True)


if __name__ == "__main__":
    main()
