"""What a plan takes: seconds by stage and peak memory, on checkpoints of real shapes.

`python tests/benchmarks/planning.py --shape 8b --methods auto,alphaq,uniform` writes a checkpoint
of LFM2-8B-A1B's shape with random bf16 weights (17 GB, under --folder, removed at the end unless
--keep or it was there before), and makes each plan in a process of its own. With --again, `auto`
makes a second plan at another budget, from the cache of the first.
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
    """Progress that adds up the seconds of each kind of step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open, self._since = "start", time.perf_counter()

    def step(self, detail: str) -> None:
        now = time.perf_counter()
        self.seconds[self._open] = self.seconds.get(self._open, 0.0) + now - self._since
        self._open, self._since = re.split(r",|: token", detail)[0], now


def child(options: argparse.Namespace) -> None:
    """One plan, in this process; JSON of its seconds and its memory."""
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


def plans(options: argparse.Namespace) -> Iterator[str]:
    """One line a plan, each made by a child process."""
    runs = [(method, options.bits) for method in options.methods.split(",")]
    if options.again:
        runs.append(("auto", options.bits - 0.5))
    with tempfile.TemporaryDirectory() as cache:
        for method, bits in runs:
            command = [sys.executable, __file__, "--child", "--folder", str(options.folder)]
            command += ["--methods", method, "--bits", str(bits), "--target", options.target]
            command += ["--threads", str(options.threads)]
            environment = {**os.environ, "LFMC_CACHE": cache}
            made = subprocess.run(command, env=environment, capture_output=True, text=True)
            yield made.stdout.strip() if made.returncode == 0 else made.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies, or is written")
    parser.add_argument("--methods", default="auto")
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--again", action="store_true", help="a second plan by auto, half a bit less"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with checkpoint_of(options.shape, options.folder, keep=options.keep) as options.folder:
        for line in plans(options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
