"""The `transformers.js` layout, run by transformers.js in Node and, by the example page, in a
browser: on WebGPU (SwiftShader, which computes it on the CPU) and in WebAssembly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import lfmc
from lfmc.bundle.bundle import GOLDEN, write_json
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.run.stepper import Stepper
from tests.factories import random_tokens

pytestmark = pytest.mark.web

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "web"
SCRIPTS = Path(__file__).parent / "web"
MODULES = ROOT / "build" / "web" / "node_modules"
DEVICES = ("webgpu", "wasm")
# A checkpoint, a bit width, and how far the best logit must lead, relative to the largest, for a
# token to be compared: runtimes round activations differently, and logits of a random model are
# close. Trained checkpoints that users do not have are skipped.
BUNDLES = {
    "lfm2-float": ("lfm2", "none", 1e-3),
    "lfm2-8bit": ("lfm2", "8", 0.02),
    "lfm2-2bit": ("lfm2", "2", 0.02),
    "lfm3-float": ("lfm3", "none", 1e-3),
    "lfm3-4bit": ("lfm3-17m", "4", 0.02),
    "moe-float": ("lfm2_moe", "none", 1e-3),
    "moe-4bit": ("lfm2-moe-8m", "4", 0.004),
}
LONG = 40  # tokens of a prompt that fills the sliding window of the tiny lfm3
SHORT_PROMPTS = 10  # random prompts besides the golden ones, because few tokens of one are clear


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example page and the npm packages."""
    folder = tmp_path_factory.mktemp("web")
    for path in EXAMPLE.iterdir():
        if path.suffix in (".html", ".js"):
            shutil.copy(path, folder)
    (folder / "node_modules").symlink_to(MODULES)
    return folder


@pytest.fixture(scope="module")
def exported(any_checkpoint: Callable[[str], Checkpoint], root: Path) -> Callable[[str], Path]:
    """Return `exported(name)`: the folder in `root` of a bundle in `BUNDLES`, written once."""

    def export(name: str) -> Path:
        checkpoint_name, bits, lead = BUNDLES[name]
        checkpoint = any_checkpoint(checkpoint_name)
        if not (root / name).is_dir():
            bundle = lfmc.export(
                checkpoint.path,
                output=root / name,
                bits=bits,
                check="fast",
                context=256,
                target_options={"layout": "transformers.js"},
            )
            prompts = [entry["prompt"] for entry in bundle.read_json(GOLDEN)]
            prompts += random_tokens(checkpoint.config, 1, LONG).tolist()
            prompts += random_tokens(checkpoint.config, SHORT_PROMPTS, 5).tolist()
            stepper = lfmc.load(bundle)
            golden = [golden_prompt(stepper, prompt, lead) for prompt in prompts]
            assert sum(len(entry["tokens"]) for entry in golden) >= 4
            write_json(bundle.path / GOLDEN, [entry for entry in golden if entry["tokens"]])
        return root / name

    return export


def golden_prompt(stepper: Stepper, prompt: list[int], lead: float) -> dict[str, Any]:
    """Return a prompt and its greedy continuation, up to a logit that leads by less than `lead`."""
    stepper.reset()
    logits, tokens = stepper.step(prompt)[-1], list[int]()
    while len(tokens) < 12:
        first, second = logits.topk(2).values
        if first - second < lead * logits.abs().max():
            break
        tokens.append(int(logits.argmax()))
        logits = stepper.step(tokens[-1:])[-1]
    return {"text": str(prompt), "prompt": prompt, "tokens": tokens}


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    """The address of a server of `root`, as `python -m http.server` is one."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def run_node(script: str, *arguments: object) -> dict[str, Any]:
    command = ["node", SCRIPTS / script, MODULES, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    print(process.stderr[-3000:])
    return result


@pytest.mark.parametrize("name", BUNDLES)
def test_node_generates_what_lfmc_generates(exported: Callable[[str], Path], name: str) -> None:
    result = run_node("node.mjs", EXAMPLE / "model.js", exported(name))
    assert result["failed"] == []
    assert result["count"]
    assert result["streamed"] == result["reply"]
    assert result["length"] > 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BUNDLES)
def test_the_example_page_generates_what_lfmc_generates(
    exported: Callable[[str], Path], server: str, name: str, device: str
) -> None:
    exported(name)
    chromium = os.environ.get("CHROMIUM", "chromium")
    url = f"{server}/index.html?bundle={name}&device={device}&tokens=4"
    result = run_node("page.mjs", shutil.which(chromium) or chromium, url)
    assert result["origins"] == [server]  # nothing is loaded from the internet
    if device == "webgpu" and name.startswith("moe"):
        assert result["loaded"].startswith("error: experts can't run on WebGPU"), result
        return
    assert result["loaded"].endswith("256 tokens"), result
    assert result["tested"] == "golden prompts: as at export", result
    assert result["chat"] == "done", result
    assert [role for role, _ in result["conversation"]] == ["user", "assistant"]
