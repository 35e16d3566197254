"""What a width for every expert costs, against one width for a layer.

`python tests/benchmarks/experts.py [MODEL]` lowers the same checkpoint with its experts all at 4
bits, all at 2, and mixed (every second one at 2; in turn 2, 4 and 8), and times prefill and decode
of the artifacts in interleaved rounds. `--shape 8b` makes a random checkpoint with one sparse layer
of LFM2-8B-A1B's shape (32 experts of 2048 x 1792, 4 a token) in a temporary folder instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lfmc.calib_free.allocate import make_plan
from lfmc.calib_free.formats import Format
from lfmc.calib_free.plan import BitPlan, PlanRow
from lfmc.checkpoint import Checkpoint, open_checkpoint
from lfmc.exporter import Options, build_program, request
from lfmc.model import build_decoder, read_config
from lfmc.progress import Silent
from lfmc.stepping import Stepper
from lfmc.targets.base import get_target
from lfmc.timing import time_round
from lfmc.weights import PlannedWeights

MIXES = {"all 4": (4,), "all 2": (2,), "2 and 4": (2, 4), "2, 4 and 8": (2, 4, 8)}
BIG = {
    "model_type": "lfm2_moe",
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_hidden_layers": 2,
    "num_dense_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "layer_types": ["conv", "full_attention"],
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder of an lfm2_moe")
    parser.add_argument("--shape", choices=["model", "8b"], default="model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = asked.model if asked.shape == "model" else write_big(work / "checkpoint")
        checkpoint = open_checkpoint(model)
        base = make_plan(checkpoint, get_target("onnx").capabilities(checkpoint.config), "4", None)
        sides = {
            name: lower(checkpoint, mixed(base, widths), work / str(index))
            for index, (name, widths) in enumerate(MIXES.items())
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for index in range(asked.rounds + 1):
            for name, side in sides.items():
                seconds = time_round(side, asked.prompt, asked.tokens)
                if index:  # the first round warms up
                    times[name].append(seconds)
    print(f"{checkpoint.name}: {asked.rounds} interleaved rounds\n")
    print("| widths of a layer's experts | decode, ms a token: best (median) | x all 4 |", end="")
    print(" prefill, ms: best (median) | x all 4 |\n|---|---|---|---|---|")
    for name, rounds in times.items():
        cells = []
        for part, count in ((1, asked.tokens), (0, 1)):
            own = [1000 * r[part] / count for r in rounds]
            first = [1000 * r[part] / count for r in times["all 4"]]
            ratio = statistics.median(own) / statistics.median(first)
            cells.append(f"{min(own):.2f} ({statistics.median(own):.2f}) | {ratio:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


def mixed(plan: BitPlan, widths: tuple[int, ...]) -> BitPlan:
    """The plan with its experts' widths taken in turn."""
    return replace(plan, rows=tuple(_with_width(row, widths) for row in plan.rows))


def _with_width(row: PlanRow, widths: tuple[int, ...]) -> PlanRow:
    if row.role != "expert":
        return row
    expert = int(row.name.split(".experts.")[1].split(".")[0])
    stored = replace(Format.parse(row.format), bits=widths[expert % len(widths)])
    return replace(row, format=stored.name, grid="minmax", nbytes=stored.nbytes(row.shape))


def lower(checkpoint: Checkpoint, plan: BitPlan, folder: Path) -> Stepper:
    """The artifact of a plan, running."""
    target = get_target("onnx")
    asked = request(checkpoint, target, Options(context=512))
    program, _ = build_program(checkpoint, target, plan, asked, Silent())
    folder.mkdir()
    target.lower(program, PlannedWeights(checkpoint, plan), asked, folder)
    return target.run(folder)


def write_big(folder: Path) -> Path:
    """A random checkpoint with one sparse layer of LFM2-8B-A1B's shape."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BIG))
    torch.manual_seed(0)
    weights = {
        name: (torch.randn(value.shape) * 0.02).to(torch.bfloat16)
        for name, value in build_decoder(read_config(BIG)).state_dict().items()
        if not name.startswith("rope.")
    }
    save_file(weights, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main()
