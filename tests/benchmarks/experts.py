"""What a width for every expert costs, against one width for a layer.

`python tests/benchmarks/experts.py [MODEL]` lowers the same checkpoint with its experts all at 4
bits, all at another width, and mixed, and times prefill and decode of the artifacts in interleaved
rounds. `--shape 8b` makes a random checkpoint with one sparse layer of LFM2-8B-A1B's shape (32
experts of 2048 x 1792, 4 a token) in a temporary folder instead; `--every` has each token choose
all experts there, which is what a program that masks experts computes.
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

from lfmc.calib_free.grid.formats import ROW, Capabilities, Format
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.lowering.build import build
from lfmc.lowering.request import Options, request
from lfmc.machine.progress import Silent
from lfmc.model import build_decoder, read_config
from lfmc.run.stepper import Stepper
from lfmc.run.timing import time_round
from lfmc.targets.base import Target, get_target

MIXES = {
    "onnx": {"all 4": (4,), "all 2": (2,), "2 and 4": (2, 4), "2, 4 and 8": (2, 4, 8)},
    "executorch": {"all 4": (4,), "all 8": (8,), "4 and 8": (4, 8)},
    "tvm": {"all 4": (4,), "all 2": (2,), "2 and 4": (2, 4), "2, 3, 4 and 8": (2, 3, 4, 8)},
}
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
    parser.add_argument("--target", choices=MIXES, default="onnx")
    parser.add_argument("--every", action="store_true", help="all experts for every token")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = asked.model if asked.shape == "model" else write_big(work, every=asked.every)
        checkpoint, target = open_checkpoint(model), get_target(asked.target)
        able = target.capabilities(checkpoint.config)
        base = make_plan(checkpoint, able, "4", None)
        sides = {
            name: lower(checkpoint, target, mixed(base, able, widths), work / str(index))
            for index, (name, widths) in enumerate(MIXES[asked.target].items())
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


def mixed(plan: BitPlan, able: Capabilities, widths: tuple[int, ...]) -> BitPlan:
    """The plan with its experts' widths taken in turn."""
    return replace(plan, rows=tuple(_with_width(row, able, widths) for row in plan.rows))


def _with_width(row: PlanRow, able: Capabilities, widths: tuple[int, ...]) -> PlanRow:
    if row.role != "expert":
        return row
    expert = int(row.name.split(".experts.")[1].split(".")[0])
    planned, bits = Format.parse(row.format), widths[expert % len(widths)]
    same = replace(planned, bits=bits)
    own = same if same in able.expert else replace(same, group=ROW, scale_dtype="float32")
    grid = "clip" if able.negative_scales is False and own.symmetric else "minmax"
    return replace(row, format=own.name, grid=grid, nbytes=own.nbytes(row.shape))


def lower(checkpoint: Checkpoint, target: Target, plan: BitPlan, folder: Path) -> Stepper:
    """The artifact of a plan, running."""
    asked = request(checkpoint, target, Options(context=512))
    made, _ = build(checkpoint, target, plan, asked, Silent())
    folder.mkdir()
    made.lower(folder)
    return target.run(folder)


def write_big(work: Path, *, every: bool) -> Path:
    """A random checkpoint with one sparse layer of LFM2-8B-A1B's shape."""
    folder = work / "checkpoint"
    folder.mkdir()
    config = {**BIG, "num_experts_per_tok": BIG["num_experts"]} if every else BIG
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {
        name: (torch.randn(value.shape) * 0.02).to(torch.bfloat16)
        for name, value in build_decoder(read_config(config)).state_dict().items()
        if not name.startswith("rope.")
    }
    save_file(weights, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main()
