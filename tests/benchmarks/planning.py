"""Measure the seconds of each stage and the peak memory of planning, on realistic shapes.

`python tests/benchmarks/planning.py --shape 8b --methods auto,alphaq,uniform` writes a checkpoint
of LFM2-8B-A1B's shape with random bf16 weights (17 GB, under --folder; removed at the end unless
--keep is set or the checkpoint existed before). It makes each plan in a separate process. With
--again, `auto` makes a second plan at another budget, from the cache of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from shapes import SHAPES, checkpoint_of


class Stages:
    """A progress callback that sums the seconds of each kind of step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._start = "start", time.perf_counter()

    def step(self, detail: str) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._start
        self._stage, self._start = re.split(r",|: token", detail)[0], now


def child(options: argparse.Namespace) -> None:
    """Make one plan in this process, and print its seconds and memory as JSON."""
    from lfmc.calib_free.allocate.resources import Resources
    from lfmc.calib_free.make_plan import Budget, make_plan
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.machine.cache import default_cache
    from lfmc.targets.base import get_target

    torch.set_num_threads(options.threads)
    stages, start = Stages(), time.perf_counter()
    checkpoint = open_checkpoint(options.folder)
    capabilities = get_target(options.target).capabilities(checkpoint.config)
    plan = make_plan(
        checkpoint,
        capabilities,
        options.methods,
        Budget(options.bits),
        target=options.target,
        progress=stages.step,
        resources=Resources(cache=default_cache()),
    )
    stages.step("end")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "method": options.methods,
                "bits": round(plan.bits_per_weight, 3),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
                "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
                "stages": {k: round(v, 1) for k, v in stages.seconds.items() if v >= 0.05},
            }
        )
    )


def run_children(options: argparse.Namespace) -> Iterator[str]:
    """Make each plan in a child process; yield its line of JSON."""
    runs = [(method, options.bits) for method in options.methods.split(",")]
    if options.again:
        runs.append(("auto", options.bits - 0.5))
    with tempfile.TemporaryDirectory() as cache:
        for method, bits in runs:
            command = [sys.executable, __file__, "--child", "--folder", str(options.folder)]
            command += ["--methods", method, "--bits", str(bits), "--target", options.target]
            command += ["--threads", str(options.threads)]
            environment = {**os.environ, "LFMC_CACHE": cache}
            process = subprocess.run(command, env=environment, capture_output=True, text=True)
            yield process.stdout.strip() if process.returncode == 0 else process.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", type=Path, help="of the checkpoint; written if it is missing")
    parser.add_argument("--methods", default="auto")
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--again", action="store_true", help="make a second plan by auto with half a bit less"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with checkpoint_of(options.shape, options.folder, keep=options.keep) as options.folder:
        for line in run_children(options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
