"""The C++ runner, which needs no Python and no torch, here and on 64-bit Arm under qemu."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint, demo_path, open_checkpoint
from lfmc.errors import InputError
from lfmc.run.generate import continue_tokens
from lfmc.targets.base import get_target
from lfmc.targets.shared.rounding_noise import noise_rung
from tests.conftest import TRAINED
from tests.targets.executorch.programs import PROGRAMS, floats, four_bit, mixed
from tests.targets.lowering import Choose, Lowered, lower
from tests.targets.runner import RunnerStepper, arm, as_bundle, native

Make = Callable[..., Lowered]
Runner = list[str]


@pytest.fixture(scope="session", params=["native", pytest.param("arm", marks=pytest.mark.arm)])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    build = {"native": native, "arm": arm}[request.param]
    return build(tmp_path_factory.mktemp(f"runner-{request.param}"), "executorch")


@pytest.fixture
def start(runner: Runner) -> Iterator[Callable[[Lowered, Path], RunnerStepper]]:
    """`start(build, folder)`: a conversation with the runner, which ends with the test."""
    steppers = []

    def open_stepper(build: Lowered, folder: Path) -> RunnerStepper:
        vocab_size, context = build.checkpoint.config.vocab_size, build.request.context
        steppers.append(RunnerStepper(runner, as_bundle(build, folder), context, vocab_size))
        return steppers[-1]

    yield open_stepper
    for stepper in steppers:
        stepper.close()


@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_matrix(
    lowered: Make,
    start: Callable[[Lowered, Path], RunnerStepper],
    name: str,
    choose: Choose,
    tmp_path: Path,
) -> None:
    build = lowered(name, choose, "executorch")
    tolerance = 1e-5 if choose is floats else 3e-2  # a few values round differently
    rung = build.run_matrix(
        start(build, tmp_path), build.reference(exact=False), tolerance=tolerance
    )
    assert rung.passed, rung
    (single,) = (case for case in rung.cases if case.case == "one-token prompt")
    assert single.difference < 1e-5


@pytest.mark.arm
@pytest.mark.parametrize("name", [demo_path().name, *TRAINED[1:]])
def test_trained_checkpoints(
    any_checkpoint: Callable[[str], Checkpoint],
    start: Callable[[Lowered, Path], RunnerStepper],
    name: str,
    tmp_path: Path,
) -> None:
    """The error is within the rounding noise that the export's own gate allows."""
    build = lower(any_checkpoint(name), mixed, tmp_path, name="executorch")
    reference = build.reference(exact=False)
    rung = noise_rung(build.program, reference, start(build, tmp_path / "bundle"))
    assert rung.passed, rung
    assert rung.cases[0].difference < 1e-2


def test_the_runner_generates_the_text_of_lfmc(runner: Runner, bundle: Bundle) -> None:
    checkpoint = open_checkpoint()
    tokenizer = checkpoint.tokenizer()
    ids = [checkpoint.config.bos_id, *tokenizer.encode("Once upon a time").ids]
    prompt = ",".join(map(str, ids))
    command = [*runner, str(bundle.path), prompt, "12"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    generated = continue_tokens(
        get_target("executorch").run(bundle.path), ids, 12, checkpoint.stop_ids
    )
    assert process.stdout == tokenizer.decode(list(generated)) + "\n"
    assert "tokens/s" in process.stderr


def test_the_runner_rejects_invalid_tokens_and_long_conversations(
    lowered: Make, start: Callable[[Lowered, Path], RunnerStepper], tmp_path: Path
) -> None:
    build = lowered("lfm2-untied", four_bit, "executorch")
    stepper = start(build, tmp_path)
    first = stepper.step([1, 2, 3])
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([build.checkpoint.config.vocab_size])
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([-1])
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
        (lambda path: (path / "manifest.json").write_text("{"), "parse error"),
        (lambda path: (path / "manifest.json").write_text('{"target": "onnx"}'), "not executorch"),
        (lambda path: (path / "model.pte").unlink(), "is missing"),
        (lambda path: (path / "model.pte").write_bytes(b"0" * 5000), "can't load it"),
    ],
)
def test_the_runner_rejects_an_invalid_bundle(
    runner: Runner,
    lowered: Make,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    folder = as_bundle(lowered("lfm2-untied", four_bit, "executorch"), tmp_path)
    spoil(folder)
    process = subprocess.run(
        [*runner, str(folder), "1"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert message in process.stderr
