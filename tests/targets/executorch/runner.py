"""The C++ runner of `examples/cpp`: built for this machine or for Arm, and driven as a stepper."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lfmc.errors import InputError
from tests.targets.lowering import Lowered

SOURCE = Path(__file__).parents[3] / "examples" / "cpp" / "executorch_runner"
ARM = "aarch64-linux-gnu"


class RunnerStepper:
    """A conversation with `executorch_runner BUNDLE --serve`."""

    def __init__(self, command: Sequence[str], bundle: Path, context: int, vocab_size: int) -> None:
        self.context, self._vocab_size = context, vocab_size
        manifest = json.loads((bundle / "manifest.json").read_text())
        self.last_only = manifest["options"]["logits"] == "last"
        self._process = subprocess.Popen(
            [*command, str(bundle), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def reset(self) -> None:
        self._ask("reset")

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(tokens).reshape(-1).tolist()
        return self._ask("step " + " ".join(map(str, ids))).view(-1, self._vocab_size)

    def _ask(self, request: str) -> Tensor:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().decode()
        count, _, reason = answer.partition(" ")
        if int(count) < 0:
            raise InputError(reason.strip())
        data = self._process.stdout.read(4 * int(count))
        return torch.from_numpy(np.frombuffer(data, np.float32).copy())

    def close(self) -> None:
        self._process.communicate()


def as_bundle(made: Lowered, folder: Path) -> Path:
    """A folder with the program and as much of a manifest as the runner reads."""
    folder.mkdir(exist_ok=True)
    config, request = made.checkpoint.config, made.request
    manifest = {
        "target": "executorch",
        "options": dict(request.options),
        "artifact": list(made.artifact.files),
        "context": request.context,
        "chunk": made.artifact.facts["chunk"],
        "model": {"vocab_size": config.vocab_size},
        "tokens": {"bos": config.bos_id, "stop": list(made.checkpoint.stop_ids)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in made.artifact.files:
        shutil.copy(made.folder / name, folder)
    return folder


def native(folder: Path) -> list[str]:
    """The command of a runner for this machine; skips where it can't be built."""
    spec = find_spec("executorch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return [str(_build(folder, Path(next(iter(spec.submodule_search_locations)))))]


def arm(folder: Path) -> list[str]:
    """The command of a runner for 64-bit Arm, under qemu; skips where it can't be built or run."""
    for tool in (f"{ARM}-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on this machine")
    package = _arm_package(folder / "wheel")
    runner = _build(folder, package, f"-DCMAKE_TOOLCHAIN_FILE={SOURCE / ARM}.cmake")
    # Without SME: there, 8-bit products of several tokens are wrong, those of ExecuTorch's own
    # exporter too (qemu 7.2). Whether the emulator or XNNPACK's kernels are, a device would tell.
    return ["qemu-aarch64", "-cpu", "max,sme=off", "-L", f"/usr/{ARM}", str(runner)]


def _arm_package(folder: Path) -> Path:
    """ExecuTorch's libraries and headers for Arm, of the version that is installed here."""
    wanted = f"executorch=={version('executorch')}"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platform = ["--platform", "manylinux_2_28_aarch64", "--python-version", python]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, *platform, "-d", str(folder), wanted], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "executorch"


def _build(folder: Path, package: Path, *options: str) -> Path:
    cmake = Path(sys.executable).with_name("cmake")
    if not cmake.is_file() or shutil.which("g++") is None:
        pytest.skip("a C++ compiler or CMake is not on this machine")
    if not Path("/usr/include/nlohmann/json.hpp").is_file():
        pytest.skip("nlohmann-json is not on this machine")
    build = folder / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={package};/usr"
    for command in (
        [cmake, "-S", SOURCE, "-B", build, prefix, *options],
        [cmake, "--build", build, "-j2"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "executorch_runner"
