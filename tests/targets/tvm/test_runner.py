"""The C++ runner, without Python, on this machine and on 64-bit Arm under qemu."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint, demo_path
from lfmc.errors import InputError
from lfmc.parity.compare import cases, compare
from lfmc.run.generate import continue_tokens
from lfmc.run.stepper import TorchStepper
from lfmc.targets.shared.rounding_noise import noise_rung
from tests.conftest import TRAINED
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered, four_bit, lower
from tests.targets.programs import PROGRAMS, floats, mixed
from tests.targets.runner import RunnerStepper, arm, as_bundle, native

Make = Callable[..., Lowered]
Start = Callable[[Lowered, Path], RunnerStepper]
Runner = tuple[list[str], str]  # a command, and the device that its bundles are for


@pytest.fixture(scope="session", params=["native", pytest.param("arm", marks=pytest.mark.arm)])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp(f"runner-{request.param}")
    if request.param == "native":
        return native(folder, "tvm"), "cpu"
    return arm(folder, "tvm"), "cpu:neon-dotprod"


@pytest.fixture
def start(runner: Runner) -> Iterator[Start]:
    """`start(made, folder)`: a conversation with the runner, ended with the test."""
    begun = []

    def begin(made: Lowered, folder: Path) -> RunnerStepper:
        vocab_size, context = made.checkpoint.config.vocab_size, made.asked.context
        begun.append(RunnerStepper(runner[0], as_bundle(made, folder), context, vocab_size))
        return begun[-1]

    yield begin
    for stepper in begun:
        stepper.close()


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(
    lowered: Make, runner: Runner, start: Start, name: str, choose: Choose, tmp_path: Path
) -> None:
    """Floats to float precision; rounded activations to what turned roundings move."""
    made = lowered(name, choose, "tvm", device=runner[1])
    config, context = made.checkpoint.config, made.asked.context
    rung = compare(
        3,
        "runner",
        start(made, tmp_path),
        TorchStepper(
            made.reference(exact=False),
            config,
            context,
        ),
        cases(config, context, full=True),
        config.vocab_size,
        tolerance=1e-5 if choose is floats else 3e-2,
    )
    assert rung.passed, rung
    (single,) = (case for case in rung.cases if case.case == "one-token prompt")
    assert single.difference < 1e-5  # too few roundings for one of them to turn


def test_it_says_what_python_says(
    lowered: Make, runner: Runner, start: Start, tmp_path: Path
) -> None:
    made = lowered("lfm2_moe", mixed, "tvm", device=runner[1])
    if runner[1] != "cpu":
        pytest.skip("Python runs on another CPU than this runner")
    tokens = random_tokens(made.checkpoint.config, 1, 40)[0]
    ours, theirs = start(made, tmp_path), made.target.run(made.folder)
    for piece in tokens.split([30, 1, 9]):
        assert torch.equal(ours.step(piece), theirs.step(piece))


@pytest.mark.arm
@pytest.mark.parametrize("name", [demo_path().name, *TRAINED[1:]])
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], Checkpoint],
    runner: Runner,
    start: Start,
    name: str,
    tmp_path: Path,
) -> None:
    """As near to torch that rounds alike as the export's own gate asks for."""
    options = {"device": runner[1]}
    made = lower(any_checkpoint(name), mixed, tmp_path, name="tvm", options=options)
    rounding = made.reference(exact=False)
    rung = noise_rung(made.program, rounding, start(made, tmp_path / "bundle"))
    assert rung.passed, rung
    assert rung.cases[0].difference < 1e-2


def test_what_it_says(lowered: Make, runner: Runner, tmp_path: Path) -> None:
    made = lowered("lfm2-untied", four_bit, "tvm", device=runner[1])
    tokenizer, ids = made.checkpoint.tokenizer(), [1, 523, 88]
    command = [*runner[0], str(as_bundle(made, tmp_path)), "1,523,88", "12"]
    for name in ("tokenizer.json",):
        (tmp_path / name).write_bytes((made.checkpoint.path / name).read_bytes())
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "tokens/s" in said.stderr
    if runner[1] == "cpu":
        stepper = made.target.run(made.folder)
        own = list(continue_tokens(stepper, ids, 12, made.checkpoint.stop_ids))
        assert said.stdout == tokenizer.decode(own) + "\n"


def test_what_it_refuses(lowered: Make, runner: Runner, start: Start, tmp_path: Path) -> None:
    made = lowered("lfm2-untied", four_bit, "tvm", device=runner[1])
    stepper = start(made, tmp_path)
    first = stepper.step([1, 2, 3])
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([made.checkpoint.config.vocab_size])
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
def test_a_bundle_that_is_none(
    runner: Runner,
    lowered: Make,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    folder = as_bundle(lowered("lfm2-untied", four_bit, "tvm", device=runner[1]), tmp_path)
    spoil(folder)
    done = subprocess.run(
        [*runner[0], str(folder), "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
