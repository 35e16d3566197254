"""Libraries for GPUs: compiled and read back if the tools are installed, run if TVM finds a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tvm

from lfmc.errors import GateError, InputError, UnsupportedError
from lfmc.exporter.export import export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from lfmc.targets.shared.code_object import check_code_objects
from lfmc.targets.tvm import target
from lfmc.targets.tvm.gpus import GPUS, missing_gpu_tools
from lfmc.targets.tvm.runtime import LIBRARY
from lfmc.verification.readback import read_back
from tests.targets.lowering import Choose, Lowered
from tests.targets.matrix import assert_matrix
from tests.targets.programs import PROGRAMS, mixed, mostly_slow
from tests.targets.runner import RunnerStepper, as_bundle
from tests.targets.tvm.pocl import pocl_device

Lower = Callable[..., Lowered]


def _requires_tools(name: str) -> object:
    missing = missing_gpu_tools(GPUS[name])
    reason = f"install {' and '.join(missing)}"
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=reason))


@pytest.mark.parametrize(
    "device", [_requires_tools(name) for name in GPUS if name.startswith("rocm")]
)
def test_amd_code_objects_are_valid(lowered: Lower, device: str) -> None:
    """Code objects are for the right chip and wave size, fit its registers and shared memory, and
    spill no register."""
    build = lowered("lfm2_moe", mixed, "tvm", device=device)
    facts = build.artifact.facts["code_objects"]
    assert facts["wave"] == (64 if device == "rocm:gfx942" else 32)
    assert facts["kernels"] > 20
    assert facts["most_shared_nbytes"] <= 64 << 10
    read_back(build, build.folder, build.artifact)
    other_gpu = next(gpu for gpu in GPUS.values() if gpu.kind == "rocm" and gpu.name != device)
    with pytest.raises(GateError, match="are not valid for this GPU"):
        check_code_objects(build.folder / LIBRARY, other_gpu.arch, other_gpu.wave, "tvm")
    arch, wrong_wave = GPUS[device].arch, 96 - facts["wave"]
    with pytest.raises(GateError, match=r"waves of (32|64) threads"):
        check_code_objects(build.folder / LIBRARY, arch, wrong_wave, "tvm")


def test_opencl_is_compiled_and_reported_as_not_run(
    any_checkpoint: Callable[[str], object], tmp_path: Path
) -> None:
    options = Options(bits="4", context=64, target_options={"device": "opencl"}, check="fast")
    tvm_target, checkpoint = get_target("tvm"), any_checkpoint("lfm3")
    bundle, report = export(
        checkpoint,  # type: ignore[arg-type]
        tvm_target,
        tmp_path / "bundle",
        options,
        force=False,
        progress=Silent(),
    )
    assert "no opencl device" in bundle.manifest["not_executed"]
    assert report.verification is not None
    assert [bool(rung.skipped) for rung in report.verification.rungs] == [False, False, True, True]
    assert report.verification.quality is None
    source = (bundle.path / LIBRARY).read_bytes()
    assert b"__kernel" in source
    with pytest.raises(UnsupportedError, match="this machine can't run the library"):
        tvm_target.run(bundle.path)
    gated = Options(context=64, target_options={"device": "opencl"}, max_kl=0.1)
    with pytest.raises(InputError, match="--max-kl needs the artifact to be executed"):
        export(checkpoint, tvm_target, tmp_path / "b", gated, force=False, progress=Silent())  # type: ignore[arg-type]


def test_missing_tools_are_named(
    lowered: Lower, any_checkpoint: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = lowered("lfm3-attention-bias", mixed, "tvm").request
    missing = ["an lld (Debian: lld-22)"]
    monkeypatch.setattr(target, "missing_device_tools", lambda device: missing)
    tvm_target = get_target("tvm")
    assert tvm_target.missing_tools()["device=rocm:gfx1100"] == missing
    with pytest.raises(UnsupportedError, match="install an lld"):
        tvm_target.check(any_checkpoint("lfm3").config, request)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(lowered: Lower, kind: str, name: str, choose: Choose) -> None:
    if not tvm.device(kind).exist:
        pytest.skip(f"run it where TVM finds a {kind} device (docs/tvm.md)")
    device = next(gpu.name for gpu in GPUS.values() if gpu.kind == kind)
    build = lowered(name, choose, "tvm", device=device)
    assert_matrix(build, build.target.run(build.folder))


@pytest.mark.skipif(
    pocl_device() is None, reason="PoCL is not installed: apt-get install pocl-opencl-icd"
)
@pytest.mark.parametrize(("name", "choose"), mostly_slow(PROGRAMS, "lfm2_moe"))
def test_matrix_with_opencl(lowered: Lower, name: str, choose: Choose, tmp_path: Path) -> None:
    build = lowered(name, choose, "tvm", device="opencl")
    vocab_size, context = build.checkpoint.config.vocab_size, build.request.context
    command = [sys.executable, "-m", "tests.targets.tvm.pocl"]
    stepper = RunnerStepper(command, as_bundle(build, tmp_path), context, vocab_size)
    try:
        assert_matrix(build, stepper)
    finally:
        stepper.close()
