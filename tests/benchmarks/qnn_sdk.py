"""Check which versions of Qualcomm's SDK work with ExecuTorch, several times each.

    python tests/benchmarks/qnn_sdk.py SDK [SDK ...] --rounds 10

SDK is a folder that contains lib/x86_64-linux-clang/libQnnHtp.so. Each round runs in a separate
process. It compiles a small block for an SoC with `lfmc.targets.qualcomm.delegate`, runs the block
in the emulator, and compares the result with torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click
import torch
from torch import nn

from lfmc.errors import LfmcError
from lfmc.targets.npu.qdq_pairs import QdqGraph
from lfmc.targets.qualcomm import delegate
from lfmc.targets.qualcomm.socs import SOCS

SIZE, TOKENS = 64, 16
TOLERANCE = 1e-2  # relative to the largest output value: float16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        gate, value = self.up(x).chunk(2, -1)
        return (self.down(torch.sigmoid(gate) * value),)


def run_round(soc: str) -> str:
    """Compile, run and compare; return the outcome in words."""
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(1, TOKENS, SIZE)
    module = torch.export.export(block, (x,)).module()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "block.pte"
        try:
            delegate.compile_graph(QdqGraph(module, (x,), ()), SOCS[soc], path, float16=True)
            actual = delegate.open_pte(path, ["x"], ["y"])({"x": x})["y"]
        except LfmcError as error:
            return f"refused: {error.got}"
        (expected,) = block(x)
        error = float((actual - expected).abs().max() / expected.abs().max())
    return "right" if error < TOLERANCE else f"wrong by {error:.1e}"


@click.command(help=__doc__)
@click.argument("sdks", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=10, show_default=True)
@click.option("--soc", "socs", multiple=True, default=tuple(SOCS), show_default=True)
@click.option("--once", is_flag=True, hidden=True)
def main(sdks: tuple[Path, ...], rounds: int, socs: tuple[str, ...], once: bool) -> None:
    if once:
        print(json.dumps(run_round(socs[0])))
        return
    for sdk in sdks:
        for soc in socs:
            outcomes = Counter(_run_process(sdk, soc) for _ in range(rounds))
            print(f"{sdk} {soc}: {dict(outcomes)}", flush=True)


def _run_process(sdk: Path, soc: str) -> str:
    command = [sys.executable, __file__, str(sdk), "--once", "--soc", soc]
    environment = {**os.environ, delegate.SDK_ROOT: str(sdk)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        return f"ended with {process.returncode}"
    outcome: str = json.loads(process.stdout.splitlines()[-1])
    return outcome


if __name__ == "__main__":
    main()
