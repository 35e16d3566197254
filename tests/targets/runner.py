"""Build the C++ runners of `examples/cpp` for this machine or for Arm, and use them as steppers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lfmc.errors import InputError
from tests.targets.lowering import Lowered

SOURCES = Path(__file__).parents[2] / "examples" / "cpp"
ARM = "aarch64-linux-gnu"
# The packages whose wheels contain a runner's libraries and headers, by their modules.
PACKAGES: Mapping[str, Mapping[str, str]] = {
    "executorch": {"executorch": "executorch"},
    "tvm": {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"},
}


class RunnerStepper:
    """A conversation with `RUNNER BUNDLE --serve`."""

    def __init__(self, command: Sequence[str], bundle: Path, context: int, vocab_size: int) -> None:
        self.context, self._vocab_size = context, vocab_size
        manifest = json.loads((bundle / "manifest.json").read_text())
        self.last_only = manifest["options"].get("logits") == "last"
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


def as_bundle(build: Lowered, folder: Path) -> Path:
    """Make a folder with the artifact and the part of a manifest that a runner reads."""
    folder.mkdir(exist_ok=True)
    config, request = build.checkpoint.config, build.request
    manifest = {
        "target": build.target.name,
        "options": dict(request.options),
        "artifact": list(build.artifact.files),
        "context": request.context,
        "chunk": build.artifact.facts["chunk"],
        "model": {"vocab_size": config.vocab_size},
        "tokens": {"bos": config.bos_id, "stop": list(build.checkpoint.stop_ids)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in build.artifact.files:
        shutil.copy(build.folder / name, folder)
    return folder


def native(folder: Path, target: str) -> list[str]:
    """Return the command of a runner for this machine, or skip if it can't be built."""
    roots = [_root(module) for module in PACKAGES[target]]
    return [str(_build(folder, target, roots[0].parent))]


def arm(folder: Path, target: str) -> list[str]:
    """Return the command of a runner for 64-bit Arm, under qemu, or skip if it can't be built."""
    emulator = under_qemu()
    site = folder / "site"
    for package in PACKAGES[target].values():
        unpack_for_arm(package, site)
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'host' / ARM}.cmake"
    return [*emulator, str(_build(folder, target, site, toolchain))]


def under_qemu() -> list[str]:
    """Return the command that runs a program for 64-bit Arm, or skip if its tools are missing."""
    for tool in (f"{ARM}-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: make test-arm names its packages")
    # SME is off: with it, 8-bit products of several tokens are wrong, even from ExecuTorch's own
    # exporter (qemu 7.2). Only a device could show whether the emulator or XNNPACK is at fault.
    return ["qemu-aarch64", "-cpu", "max,sme=off", "-L", f"/usr/{ARM}"]


def _root(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def unpack_for_arm(package: str, site: Path) -> None:
    """Unpack a package's libraries and headers for Arm, in the version that is installed here."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 24, 17)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += [f"--platform={platform}" for platform in platforms]
    command += ["--python-version", python, "-d", str(site / package)]
    subprocess.run([*command, f"{package}=={version(package)}"], check=True)
    (wheel,) = (site / package).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


def _build(folder: Path, target: str, site: Path, *options: str) -> Path:
    cmake = Path(sys.executable).with_name("cmake")
    if not cmake.is_file() or shutil.which("g++") is None:
        pytest.skip("no C++ compiler or CMake: apt-get install g++ cmake")
    if not Path("/usr/include/nlohmann/json.hpp").is_file():
        pytest.skip("nlohmann-json is not installed: apt-get install nlohmann-json3-dev")
    build_folder, source = folder / "build", SOURCES / f"{target}_runner"
    settings = [f"-DCMAKE_PREFIX_PATH={site / 'executorch'};/usr", f"-DSITE={site}"]
    for command in (
        [cmake, "-S", source, "-B", build_folder, *settings, *options],
        [cmake, "--build", build_folder, "-j2"],
    ):
        process = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stdout + process.stderr
    return build_folder / f"{target}_runner"
