"""Which versions of Qualcomm's SDK ExecuTorch can compile and emulate with, several times each.

    python tests/benchmarks/qnn_sdk.py SDK [SDK ...] --rounds 10

An SDK is a folder that has lib/x86_64-linux-clang/libQnnHtp.so. Every round is a process of its
own: it compiles a small block for a chip by `lfmc.targets.qualcomm.delegate`, runs it, compares.
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
from lfmc.targets.npu.qdq_pairs import Pairs
from lfmc.targets.qualcomm import delegate
from lfmc.targets.qualcomm.socs import SOCS

SIZE, TOKENS = 64, 16
TOLERANCE = 1e-2  # of the largest result: float16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        gate, value = self.up(x).chunk(2, -1)
        return (self.down(torch.sigmoid(gate) * value),)


def attempt(soc: str) -> str:
    """Compile, run and compare; what came of it."""
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(1, TOKENS, SIZE)
    module = torch.export.export(block, (x,)).module()
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        path = Path(place) / "block.pte"
        try:
            delegate.compile_graph(Pairs(module, (x,), ()), SOCS[soc], path, halves=True)
            made = delegate.open_pte(path, ["x"], ["y"])({"x": x})["y"]
        except LfmcError as error:
            return f"refused: {error.got}"
        (wanted,) = block(x)
        apart = float((made - wanted).abs().max() / wanted.abs().max())
    return "right" if apart < TOLERANCE else f"wrong by {apart:.1e}"


@click.command(help=__doc__)
@click.argument("sdks", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=10, show_default=True)
@click.option("--soc", "socs", multiple=True, default=tuple(SOCS), show_default=True)
@click.option("--once", is_flag=True, hidden=True)
def main(sdks: tuple[Path, ...], rounds: int, socs: tuple[str, ...], once: bool) -> None:
    if once:
        print(json.dumps(attempt(socs[0])))
        return
    for sdk in sdks:
        for soc in socs:
            found = Counter(_process(sdk, soc) for _ in range(rounds))
            print(f"{sdk} {soc}: {dict(found)}", flush=True)


def _process(sdk: Path, soc: str) -> str:
    command = [sys.executable, __file__, str(sdk), "--once", "--soc", soc]
    environment = {**os.environ, delegate.SDK_ROOT: str(sdk)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"ended with {done.returncode}"
    answer: str = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
