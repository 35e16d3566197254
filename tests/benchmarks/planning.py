"""What a plan takes: seconds by stage and peak memory, on checkpoints of real shapes.

`python tests/benchmarks/planning.py --shape 8b --methods auto,alphaq,uniform` writes a checkpoint
of LFM2-8B-A1B's shape with random bf16 weights (17 GB, under --folder, removed at the end unless
--keep), and makes each plan in a process of its own. With --again, `auto` makes a second plan at
another budget, from the cache of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lfmc.model import build_decoder, read_config

SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "8b": (
        {
            "model_type": "lfm2_moe",
            "num_hidden_layers": 24,
            "intermediate_size": 7168,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1792,
            "num_dense_layers": 2,
        },
        (2, 6, 10, 14, 18, 21),
    ),
    "1.2b": (
        {
            "model_type": "lfm2",
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "block_auto_adjust_ff_dim": False,
        },
        (2, 5, 8, 10, 12, 14),
    ),
    "small": (
        {
            "model_type": "lfm2_moe",
            "num_hidden_layers": 3,
            "intermediate_size": 2048,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 512,
            "num_dense_layers": 1,
        },
        (2,),
    ),
}
COMMON = {
    "vocab_size": 65536,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
POOL = 1 << 26  # random numbers, used again and again: nothing here depends on their independence


def write_checkpoint(shape: str, folder: Path) -> None:
    """A checkpoint of random weights, one file a layer."""
    changes, full = SHAPES[shape]
    kinds = ["conv"] * int(changes["num_hidden_layers"])
    for layer in full:
        kinds[layer] = "full_attention"
    raw = {**COMMON, **changes, "layer_types": kinds}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator).bfloat16()
    files: dict[str, dict[str, Tensor]] = {}
    index, total = {}, 0
    for name, value in build_decoder(read_config(raw)).state_dict().items():
        if name.startswith("rope."):
            continue
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = value
        index[name] = f"model-{part}.safetensors"
        total += value.numel()
    for file, tensors in files.items():
        save_file({n: _random(n, v, pool, generator) for n, v in tensors.items()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    print(f"{shape}: {total / 1e9:.2f} billion parameters", flush=True)


def _random(name: str, like: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    if name.endswith("expert_bias"):
        return torch.zeros(like.shape)
    count = like.numel()
    offset = int(torch.randint(0, 1 << 20, (), generator=generator))
    copies = -(-(count + offset) // len(pool))
    flat = pool.repeat(copies)[offset : offset + count]
    return (flat * like.shape[-1] ** -0.5).view(like.shape).clone()


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
    from lfmc.cache import default_cache
    from lfmc.calib_free.allocate import Budget, make_plan
    from lfmc.calib_free.resources import Resources
    from lfmc.checkpoint import open_checkpoint
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
    if options.folder is None:
        options.folder = Path(tempfile.gettempdir()) / f"lfmc-planning-{options.shape}"
    try:
        if not options.folder.exists():
            write_checkpoint(options.shape, options.folder)
        for line in plans(options):
            print(line, flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
