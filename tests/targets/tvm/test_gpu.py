"""Libraries for GPUs: compiled and read back where the tools are, run where TVM finds a GPU."""

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
from lfmc.targets.tvm.gpus import GPUS, missing_for
from lfmc.targets.tvm.runtime import LIBRARY
from lfmc.verification.readback import read_back
from tests.targets.lowering import Choose, Lowered
from tests.targets.matrix import assert_matrix
from tests.targets.programs import PROGRAMS, mixed, mostly_slow
from tests.targets.runner import RunnerStepper, as_bundle
from tests.targets.tvm.pocl import pocl_device

Make = Callable[..., Lowered]


def _tools(name: str) -> object:
    missing = missing_for(GPUS[name])
    reason = f"not on this machine: {', '.join(missing)}"
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=reason))


@pytest.mark.parametrize("device", [_tools(name) for name in GPUS if name.startswith("rocm")])
def test_code_for_amd(lowered: Make, device: str) -> None:
    """For the right chip and wave size, within its registers and shared memory, none spilled."""
    made = lowered("lfm2_moe", mixed, "tvm", device=device)
    facts = made.artifact.facts["code_objects"]
    assert facts["wave"] == (64 if device == "rocm:gfx942" else 32)
    assert facts["kernels"] > 20
    assert facts["most_shared_nbytes"] <= 64 << 10
    read_back(made, made.folder, made.artifact)
    other = next(gpu for gpu in GPUS.values() if gpu.kind == "rocm" and gpu.name != device)
    with pytest.raises(GateError, match="is not what it has to be"):
        check_code_objects(made.folder / LIBRARY, other.arch, other.wave, "tvm")
    arch, wrong = GPUS[device].arch, 96 - facts["wave"]
    with pytest.raises(GateError, match=r"waves of (32|64) threads"):
        check_code_objects(made.folder / LIBRARY, arch, wrong, "tvm")


def test_opencl_is_compiled_and_says_that_it_was_not_run(
    any_checkpoint: Callable[[str], object], tmp_path: Path
) -> None:
    options = Options(bits="4", context=64, target_options={"device": "opencl"}, check="fast")
    chosen, checkpoint = get_target("tvm"), any_checkpoint("lfm3")
    bundle, report = export(
        checkpoint,  # type: ignore[arg-type]
        chosen,
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
        chosen.run(bundle.path)
    gated = Options(context=64, target_options={"device": "opencl"}, max_kl=0.1)
    with pytest.raises(InputError, match="--max-kl needs the artifact to be executed"):
        export(checkpoint, chosen, tmp_path / "b", gated, force=False, progress=Silent())  # type: ignore[arg-type]


def test_missing_tools_are_named(
    lowered: Make, any_checkpoint: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lowered("lfm3-attention-bias", mixed, "tvm").asked
    missing = ["an lld (Debian: lld-22)"]
    monkeypatch.setattr(target, "missing_of", lambda device: missing)
    chosen = get_target("tvm")
    assert chosen.missing_tools()["device=rocm:gfx1100"] == missing
    with pytest.raises(UnsupportedError, match="install an lld"):
        chosen.check(any_checkpoint("lfm3").config, asked)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(lowered: Make, kind: str, name: str, choose: Choose) -> None:
    if not tvm.device(kind).exist:
        pytest.skip(f"TVM finds no {kind} device on this machine")
    device = next(gpu.name for gpu in GPUS.values() if gpu.kind == kind)
    made = lowered(name, choose, "tvm", device=device)
    assert_matrix(made, made.target.run(made.folder))


@pytest.mark.skipif(pocl_device() is None, reason="PoCL is not on this machine")
@pytest.mark.parametrize(("name", "choose"), mostly_slow(PROGRAMS, "lfm2_moe"))
def test_matrix_by_opencl(lowered: Make, name: str, choose: Choose, tmp_path: Path) -> None:
    made = lowered(name, choose, "tvm", device="opencl")
    vocab_size, context = made.checkpoint.config.vocab_size, made.asked.context
    command = [sys.executable, "-m", "tests.targets.tvm.pocl"]
    stepper = RunnerStepper(command, as_bundle(made, tmp_path), context, vocab_size)
    try:
        assert_matrix(made, stepper)
    finally:
        stepper.close()
