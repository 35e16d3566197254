"""Compare the speed of experts with mixed widths to that of one width in each layer.

`python tests/benchmarks/experts.py [MODEL]` lowers one checkpoint with all experts at 4 bits, with
all at another width, and with mixed widths. It times prefill and decode of the artifacts in
interleaved rounds. `--shape 8b` uses a random checkpoint with one sparse layer of LFM2-8B-A1B's
shape instead (32 experts of 2048 x 1792, 4 a token). With `--every`, each token of that checkpoint
uses all experts, like a program that masks experts.
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
from lfmc.lowering.request import Options, make_request
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
    parser.add_argument("--every", action="store_true", help="use all experts for every token")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = (
            options.model
            if options.shape == "model"
            else write_big(work, all_experts=options.every)
        )
        checkpoint, target = open_checkpoint(model), get_target(options.target)
        capabilities = target.capabilities(checkpoint.config)
        base = make_plan(checkpoint, capabilities, "4", None)
        steppers = {
            name: lower(
                checkpoint, target, with_widths(base, capabilities, widths), work / str(index)
            )
            for index, (name, widths) in enumerate(MIXES[options.target].items())
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steppers}
        for index in range(options.rounds + 1):
            for name, stepper in steppers.items():
                seconds = time_round(stepper, options.prompt, options.tokens)
                if index:  # the first round is a warm-up
                    times[name].append(seconds)
    print(f"{checkpoint.name}: {options.rounds} interleaved rounds\n")
    print("| widths of a layer's experts | decode, ms a token: best (median) | x all 4 |", end="")
    print(" prefill, ms: best (median) | x all 4 |\n|---|---|---|---|---|")
    for name, rounds in times.items():
        cells = []
        for part, count in ((1, options.tokens), (0, 1)):
            milliseconds = [1000 * r[part] / count for r in rounds]
            baseline = [1000 * r[part] / count for r in times["all 4"]]
            median = statistics.median(milliseconds)
            ratio = median / statistics.median(baseline)
            cells.append(f"{min(milliseconds):.2f} ({median:.2f}) | {ratio:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


def with_widths(plan: BitPlan, capabilities: Capabilities, widths: tuple[int, ...]) -> BitPlan:
    """Return the plan with `widths` assigned to the experts in turn."""
    return replace(plan, rows=tuple(_with_width(row, capabilities, widths) for row in plan.rows))


def _with_width(row: PlanRow, capabilities: Capabilities, widths: tuple[int, ...]) -> PlanRow:
    if row.role != "expert":
        return row
    expert = int(row.name.split(".experts.")[1].split(".")[0])
    planned, bits = Format.parse(row.format), widths[expert % len(widths)]
    number_format = replace(planned, bits=bits)
    if number_format not in capabilities.expert:
        number_format = replace(number_format, group=ROW, scale_dtype="float32")
    clips = capabilities.negative_scales is False and number_format.symmetric
    return replace(
        row,
        format=number_format.name,
        grid="clip" if clips else "minmax",
        nbytes=number_format.nbytes(row.shape),
    )


def lower(checkpoint: Checkpoint, target: Target, plan: BitPlan, folder: Path) -> Stepper:
    """Lower a plan and return a stepper of its artifact."""
    request = make_request(checkpoint, target, Options(context=512))
    artifact_build, _ = build(checkpoint, target, plan, request, Silent())
    folder.mkdir()
    artifact_build.lower(folder)
    return target.run(folder)


def write_big(work: Path, *, all_experts: bool) -> Path:
    """Write a random checkpoint with one sparse layer of LFM2-8B-A1B's shape."""
    folder = work / "checkpoint"
    folder.mkdir()
    config = {**BIG, "num_experts_per_tok": BIG["num_experts"]} if all_experts else BIG
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
