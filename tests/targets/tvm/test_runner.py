"""The C++ runner, without Python, on this machine and on 64-bit Arm under qemu."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint, demo_path
from lfmc.errors import InputError
from lfmc.run.generate import continue_tokens
from lfmc.targets.shared.rounding_noise import noise_rung
from tests.conftest import TRAINED
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered, four_bit, lower
from tests.targets.programs import PROGRAMS, floats, mixed
from tests.targets.runner import RunnerStepper, arm, as_bundle, native

Lower = Callable[..., Lowered]
Start = Callable[[Lowered, Path], RunnerStepper]
Runner = tuple[list[str], str]  # a command, and the device of its bundles


@pytest.fixture(scope="session", params=["native", pytest.param("arm", marks=pytest.mark.arm)])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp(f"runner-{request.param}")
    if request.param == "native":
        return native(folder, "tvm"), "cpu"
    return arm(folder, "tvm"), "cpu:neon-dotprod"


@pytest.fixture
def start(runner: Runner) -> Iterator[Start]:
    """Return `start(build, folder)`, which starts a conversation with the runner; the fixture ends
    it after the test."""
    steppers = []

    def start_runner(build: Lowered, folder: Path) -> RunnerStepper:
        vocab_size, context = build.checkpoint.config.vocab_size, build.request.context
        steppers.append(RunnerStepper(runner[0], as_bundle(build, folder), context, vocab_size))
        return steppers[-1]

    yield start_runner
    for stepper in steppers:
        stepper.close()


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(
    lowered: Lower, runner: Runner, start: Start, name: str, choose: Choose, tmp_path: Path
) -> None:
    """Compare float weights to float precision, and rounded activations within the effect of single
    roundings that differ."""
    build = lowered(name, choose, "tvm", device=runner[1])
    tolerance = 1e-5 if choose is floats else 3e-2  # a few values round differently
    rung = build.run_matrix(
        start(build, tmp_path), build.reference(exact=False), tolerance=tolerance
    )
    assert rung.passed, rung
    (single,) = (case for case in rung.cases if case.case == "one-token prompt")
    assert single.difference < 1e-5  # too few roundings for one to differ


def test_the_runner_equals_python(
    lowered: Lower, runner: Runner, start: Start, tmp_path: Path
) -> None:
    build = lowered("lfm2_moe", mixed, "tvm", device=runner[1])
    if runner[1] != "cpu":
        pytest.skip("Python runs on another CPU than this runner")
    tokens = random_tokens(build.checkpoint.config, 1, 40)[0]
    runner_stepper, python_stepper = start(build, tmp_path), build.target.run(build.folder)
    for piece in tokens.split([30, 1, 9]):
        assert torch.equal(runner_stepper.step(piece), python_stepper.step(piece))


@pytest.mark.arm
@pytest.mark.parametrize("name", [demo_path().name, *TRAINED[1:]])
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], Checkpoint],
    runner: Runner,
    start: Start,
    name: str,
    tmp_path: Path,
) -> None:
    """The runner is as close to torch with the same rounding as the gate of an export requires."""
    options = {"device": runner[1]}
    build = lower(any_checkpoint(name), mixed, tmp_path, name="tvm", options=options)
    rounding = build.reference(exact=False)
    rung = noise_rung(build.program, rounding, start(build, tmp_path / "bundle"))
    assert rung.passed, rung
    assert rung.cases[0].difference < 1e-2


def test_the_runner_prints_the_continuation(lowered: Lower, runner: Runner, tmp_path: Path) -> None:
    build = lowered("lfm2-untied", four_bit, "tvm", device=runner[1])
    tokenizer, ids = build.checkpoint.tokenizer(), [1, 523, 88]
    command = [*runner[0], str(as_bundle(build, tmp_path)), "1,523,88", "12"]
    for name in ("tokenizer.json",):
        (tmp_path / name).write_bytes((build.checkpoint.path / name).read_bytes())
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "tokens/s" in process.stderr
    if runner[1] == "cpu":
        stepper = build.target.run(build.folder)
        tokens = list(continue_tokens(stepper, ids, 12, build.checkpoint.stop_ids))
        assert process.stdout == tokenizer.decode(tokens) + "\n"


def test_the_runner_refuses_invalid_requests(
    lowered: Lower, runner: Runner, start: Start, tmp_path: Path
) -> None:
    build = lowered("lfm2-untied", four_bit, "tvm", device=runner[1])
    stepper = start(build, tmp_path)
    first = stepper.step([1, 2, 3])
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([build.checkpoint.config.vocab_size])
    with pytest.raises(InputError, match="longer than the exported context of 96 tokens"):
        stepper.step([1] * 94)
    stepper.step([1] * 93)
    with pytest.raises(InputError, match="longer than the exported context"):
        stepper.step([1])
    stepper.reset()
    assert torch.equal(stepper.step([1, 2, 3]), first)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "there is no bundle"),
        (lambda path: (path / "manifest.json").write_text('{"target": "onnx"}'), "not tvm"),
        (lambda path: (path / "model.so").unlink(), "is missing"),
        (lambda path: (path / "model.so").write_bytes(b"0" * 5000), "can't load it"),
        (lambda path: (path / "params.safetensors").write_bytes(b"0" * 5000), "is cut"),
    ],
)
def test_an_invalid_bundle_is_refused(
    runner: Runner,
    lowered: Lower,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    folder = as_bundle(lowered("lfm2-untied", four_bit, "tvm", device=runner[1]), tmp_path)
    spoil(folder)
    process = subprocess.run(
        [*runner[0], str(folder), "1"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert message in process.stderr
