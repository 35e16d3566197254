"""Generate text from a bundle of lfmc's MLIR target, with only IREE's runtime and tokenizers.

python generate.py BUNDLE "Once upon a time" [COUNT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import iree.runtime as iree
import numpy as np
from tokenizers import Tokenizer

DRIVERS = {"cpu": "local-task", "vulkan": "vulkan", "hip": "hip", "cuda": "cuda"}


def load(bundle: Path, device: str) -> Any:
    """Load the compiled module with mapped parameters; return its functions."""
    config = iree.Config(DRIVERS[device.split(":")[0]])
    index = iree.ParameterIndex()
    index.load(str(bundle / "params.safetensors"))
    modules = [
        iree.create_io_parameters_module(config.vm_instance, index.create_provider("model")),
        iree.create_hal_module(config.vm_instance, config.device),
        iree.VmModule.mmap(config.vm_instance, str(bundle / "model.vmfb")),
    ]
    return iree.SystemContext(vm_modules=modules, config=config).modules[modules[-1].name]


def generate(bundle: Path, prompt: str, count: int) -> str:
    """Continue a prompt greedily by at most `count` tokens."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    functions = load(bundle, manifest["device"])
    tokens = manifest["tokens"]
    ids = [tokens["bos"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
    functions["reset"]()
    start, logits = 0, None
    while start < len(ids):  # in calls of the lengths that the module has functions for
        size = next(length for length in manifest["lengths"] if length <= len(ids) - start)
        name = "decode" if size == 1 else f"prefill_{size}"
        chunk = np.array(ids[start : start + size], np.int32)
        logits = functions[name](chunk, np.array([start], np.int32)).to_host()
        start += size
    generated: list[int] = []
    for position in range(start, min(start + count, manifest["context"])):
        token = int(np.argmax(logits[-1]))
        if token in tokens["stop"]:
            break
        generated.append(token)
        inputs = np.array([token], np.int32), np.array([position], np.int32)
        logits = functions["decode"](*inputs).to_host()
    return tokenizer.decode(generated)


if __name__ == "__main__":
    _, path, text, *rest = sys.argv
    print(generate(Path(path), text, int(rest[0]) if rest else 32))
