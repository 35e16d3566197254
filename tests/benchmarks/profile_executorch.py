"""Profile the decode step of an ExecuTorch bundle with the runtime's event tracer.

`python tests/benchmarks/profile_executorch.py BUNDLE` runs tokens one by one and prints each
operator's share of the time: operators inside XNNPACK, and operators that the runtime runs itself.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from lfmc.bundle.bundle import open_bundle
from lfmc.targets.executorch.library import load_operators, mute

ATTENTION = "llama::custom_sdpa"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=160)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    manifest = open_bundle(options.bundle).manifest
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "etdump"
        _trace_tokens(options.bundle / manifest["artifact"][0], options.tokens, trace)
        inside, outside, total = _operator_times(trace)
    print(f"{total / options.tokens:.2f} ms a token at positions 0 to {options.tokens - 1}\n")
    print("| operator | runs in | share |\n|---|---|---|")
    rest = total - inside.total() - outside.total()
    rows = [*((name, "XNNPACK", ms) for name, ms in inside.items())]
    rows += [(name, "the runtime", ms) for name, ms in outside.items()]
    rows.append(("delegate calls and everything else", "the runtime", rest))
    for name, where, ms in sorted(rows, key=lambda row: -row[2]):
        if ms / total >= 0.001:
            print(f"| {name} | {where} | {ms / total:.1%} |")
    print(f"\noutside XNNPACK: {1 - inside.total() / total:.1%} of the time")


def _trace_tokens(program: Path, tokens: int, trace: Path) -> None:
    load_operators()
    from executorch.extension.pybindings import portable_lib

    with mute():
        module = portable_lib._load_for_executorch(str(program), enable_etdump=True)
        for position in range(tokens):
            ids = torch.tensor([[1 + position % 97]])
            module.run_method("forward", (ids, torch.tensor([position])))
        module.write_etdump_result_to_file(str(trace), "")


def _operator_times(trace: Path) -> tuple[Counter[str], Counter[str], float]:
    """Return milliseconds by operator, inside and outside XNNPACK, and the total milliseconds."""
    from executorch.devtools import Inspector

    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    total = 0.0
    for block in Inspector(etdump_path=str(trace)).event_blocks:
        for event in block.events if block.name == "Execute" else ():
            if event.perf_data is None:
                continue
            milliseconds = sum(event.perf_data.raw)
            if event.name == "Method::execute":
                total += milliseconds
            elif event.is_delegated_op:
                inside[re.sub(r" #\d+$", "", event.name)] += milliseconds
            elif event.name.startswith("native_call_"):
                outside[event.name.removeprefix("native_call_")] += milliseconds
            elif event.name.startswith(ATTENTION):
                outside[ATTENTION] += milliseconds
    return inside, outside, total


if __name__ == "__main__":
    main()
