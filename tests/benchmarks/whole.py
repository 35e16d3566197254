"""Measure whole exports of real shapes: seconds by stage, peak memory, bytes and parity.

`python tests/benchmarks/whole.py --shapes 350m,1.2b --targets onnx,tvm` writes a checkpoint of each
shape with random weights (removed at the end unless --keep is set or it existed before), and runs
`lfmc export` for each target in a separate process, with an empty cache. Options after `--` are
passed to `lfmc export`: `... -- --check fast`.

`peak` is the largest memory of the process apart from files that it maps, which the system can drop
and read again; `mapped` is the largest resident size including these files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from shapes import SHAPES, checkpoint_of

STAGE = re.compile(r"^(?:\[\d+/\d+\] )?(.+?): (stopped after )?([\d.]+) s(?:, .*)?$")
INTERVAL = 0.1  # seconds between two samples of the memory
GIB = 1 << 30


@dataclass
class Memory:
    """The largest memory of a process and its children, in bytes, from samples of /proc."""

    anonymous: int = 0
    resident: int = 0

    def sample(self, pid: int) -> None:
        totals = {"VmRSS": 0, "RssAnon": 0, "RssShmem": 0}
        for process in (pid, *_children(pid)):
            try:
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
            except OSError:
                continue  # it has ended
            for line in lines:
                key, _, value = line.partition(":")
                if key in totals:
                    totals[key] += int(value.split()[0]) << 10
        self.anonymous = max(self.anonymous, totals["RssAnon"] + totals["RssShmem"])
        self.resident = max(self.resident, totals["VmRSS"])


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


@dataclass
class Run:
    """One export: seconds and peak memory by stage, and what `--json` prints."""

    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    stage_memory: dict[str, int] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0


def export(checkpoint: Path, target: str, options: list[str]) -> Run:
    """Run `lfmc export` with an empty cache."""
    run = Run()
    folder = Path(tempfile.mkdtemp(prefix="lfmc-whole-"))
    command = [sys.executable, "-m", "lfmc", "export", str(checkpoint), "--target", target]
    command += ["--output", str(folder / "bundle"), "--json", *options]
    environment = {**os.environ, "LFMC_CACHE": str(folder / "cache")}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    stage = Memory()

    def watch() -> None:
        while process.poll() is None:
            run.memory.sample(process.pid)
            stage.sample(process.pid)
            time.sleep(INTERVAL)

    watcher = Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    assert process.stdout is not None
    for line in process.stderr:
        match = STAGE.match(line.strip())
        if match is None:
            print(f"  {line.rstrip()}", flush=True)
            continue
        name = match[1]
        run.stages[name] = run.stages.get(name, 0.0) + float(match[3])
        run.stage_memory[name] = max(run.stage_memory.get(name, 0), stage.anonymous)
        stage.anonymous = 0
        peak = run.stage_memory[name] / GIB
        print(f"  {target} {name}: {float(match[3]):.1f} s, {peak:.2f} GiB", flush=True)
    output = process.stdout.read()
    run.exit_code = process.wait()
    watcher.join()
    run.seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    try:
        run.result = json.loads(output)
    except ValueError:
        print(output)
    return run


def report(shape: str, target: str, run: Run) -> None:
    """Print a row of the table, and the failed and skipped rungs."""
    result = run.result
    rungs = result.get("parity") or []
    failed = [rung["title"] for rung in rungs if not rung["passed"] and not rung["skipped"]]
    skipped = [rung["skipped"] for rung in rungs if rung["skipped"]]
    passed = sum(rung["passed"] for rung in rungs)
    size, planned = result.get("artifact_nbytes", 0), result.get("plan_nbytes", 0)
    print(
        f"{shape} {target}: exit {run.exit_code}, {run.seconds:.0f} s, peak "
        f"{run.memory.anonymous / GIB:.2f} GiB, mapped {run.memory.resident / GIB:.2f} GiB, "
        f"{size / 1e6:.1f} MB ({size / planned if planned else 0:.4f} of the plan), "
        f"{passed} rungs passed, failed: {failed}, skipped: {skipped}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="350m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--targets", default="onnx,coreml,executorch,tvm,mlir")
    parser.add_argument("--folder", type=Path, help="of the checkpoint, if there is one shape")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("options", nargs="*", help="passed to lfmc export, after --")
    options = parser.parse_args()
    results = []
    for shape in options.shapes.split(","):
        with checkpoint_of(shape, options.folder, keep=options.keep) as folder:
            for target in options.targets.split(","):
                run = export(folder, target, options.options)
                report(shape, target, run)
                results.append(
                    {
                        "shape": shape,
                        "target": target,
                        "seconds": run.seconds,
                        "stages": run.stages,
                        "stage_nbytes": run.stage_memory,
                        "peak_nbytes": run.memory.anonymous,
                        "resident_nbytes": run.memory.resident,
                        "result": run.result,
                    }
                )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
