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
from lfmc.run.generate import continue_tokens
from tests.factories import random_tokens

pytestmark = pytest.mark.web

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "web"
SCRIPTS = Path(__file__).parent / "web"
MODULES = ROOT / "build" / "web" / "node_modules"
DEVICES = ("webgpu", "wasm")
# A name of a checkpoint, and the options of its export. Random models stay float where rounding of
# activations, which differs between runtimes, could change a token.
BUNDLES: dict[str, dict[str, Any]] = {
    "lfm2-moe-8m": {"bits_per_weight": 5.0},
    "lfm2": {"bits": "none"},
    "lfm2_moe": {"bits": "none"},
    "lfm3": {"bits": "none"},
}
LONG = 40  # tokens of a prompt that fills the sliding window of the tiny lfm3


@pytest.fixture(scope="module")
def root(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the example page, the npm packages and a bundle of each checkpoint."""
    folder = tmp_path_factory.mktemp("web")
    for path in EXAMPLE.iterdir():
        if path.suffix in (".html", ".js"):
            shutil.copy(path, folder)
    (folder / "node_modules").symlink_to(MODULES)
    for name, options in BUNDLES.items():
        checkpoint = any_checkpoint(name)
        bundle = lfmc.export(
            checkpoint.path,
            output=folder / name,
            check="fast",
            context=256,
            target_options={"layout": "transformers.js"},
            **options,
        )
        prompt = random_tokens(checkpoint.config, 1, LONG)[0].tolist()
        tokens = list(continue_tokens(lfmc.load(bundle), prompt, 8))
        golden = [*bundle.read_json(GOLDEN), {"text": "long", "prompt": prompt, "tokens": tokens}]
        write_json(bundle.path / GOLDEN, golden)
    return folder


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
def test_node_generates_what_lfmc_generates(root: Path, name: str) -> None:
    result = run_node("node.mjs", EXAMPLE / "model.js", root / name)
    assert result["failed"] == []
    assert result["count"] == 4
    assert result["streamed"] == result["reply"]
    assert result["length"] > 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BUNDLES)
def test_the_example_page_generates_what_lfmc_generates(
    root: Path, server: str, name: str, device: str
) -> None:
    chromium = os.environ.get("CHROMIUM", "chromium")
    url = f"{server}/index.html?bundle={name}&device={device}&tokens=12"
    result = run_node("page.mjs", shutil.which(chromium) or chromium, url)
    assert result["loaded"].endswith("256 tokens"), result
    assert result["tested"] == "golden prompts: as at export", result
    assert result["chat"] == "done", result
    assert [role for role, _ in result["conversation"]] == ["user", "assistant"]
    assert result["origins"] == [server]  # nothing is loaded from the internet
