"""What a test of any target asks of an artifact that runs, and of an export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.calib_free.make_plan import Budget
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import InputError
from lfmc.exporter.export import export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.parity.compare import cases, compare
from lfmc.run.generate import continue_tokens
from lfmc.run.stepper import Stepper, TorchStepper
from lfmc.targets.base import get_target
from tests.factories import random_tokens
from tests.targets.lowering import Lowered


def assert_matrix(made: Lowered, stepper: Stepper) -> None:
    """The whole matrix, to float precision, against the same quantized weights in torch."""
    config, context = made.checkpoint.config, made.asked.context
    rung = compare(
        3,
        "artifact",
        stepper,
        TorchStepper(made.program.module, config, context),
        cases(config, context, full=True),
        config.vocab_size,
        tolerance=1e-5,
    )
    assert rung.passed, rung


def assert_starts_over(made: Lowered, chunk: int) -> None:
    """A reset forgets everything, and pieces of a text give what all of it gives."""
    tokens = random_tokens(made.checkpoint.config, 1, 2 * chunk + 4)[0]
    stepper = made.target.run(made.folder)
    first = stepper.step(tokens)
    stepper.step(tokens[: chunk // 2])
    stepper.reset()
    pieces = [stepper.step(tokens[:chunk]), stepper.step(tokens[chunk:])]
    assert torch.equal(torch.cat(pieces), first)


def assert_context_ends(made: Lowered) -> None:
    """The context is used to its end, what comes behind is refused, and so is a wrong token."""
    config, context = made.checkpoint.config, made.asked.context
    tokens = random_tokens(config, 1, context)[0]
    stepper = made.target.run(made.folder)
    found = torch.cat([stepper.step(tokens[:50]), stepper.step(tokens[50:])])
    expected = TorchStepper(made.program.module, config, context).step(tokens)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(InputError, match="longer than the exported context"):
        stepper.step([1])
    stepper.reset()
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([config.vocab_size])


def export_demo(
    name: str, output: Path, bits_per_weight: float, model: Path | None = None, **options: str
) -> Bundle:
    """An export of the bundled checkpoint, or of another with its tokenizer, for 128 tokens,
    verified and within its budget."""
    asked = Options(
        budget=Budget(bits_per_weight=bits_per_weight),
        context=128,
        target_options=options,
        check="fast",
        cache=False,
    )
    checkpoint, target = open_checkpoint(model), get_target(name)
    made, report = export(checkpoint, target, output, asked, force=False, progress=Silent())
    assert report.verification is not None
    assert all(rung.passed for rung in report.verification.rungs)
    assert report.nbytes <= (report.plan.limit_nbytes or 0)
    return made


def assert_example_agrees(bundle: Bundle) -> None:
    """A target's `generate.py`, which has nothing of lfmc, continues a text as lfmc does."""
    example = Path(__file__).parents[2] / "examples" / bundle.target / "generate.py"
    prompt, count = "Once upon a time", 12
    command = [sys.executable, str(example), str(bundle.path), prompt, str(count)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokenizer = open_checkpoint().tokenizer()
    ids = [bundle.manifest["tokens"]["bos"], *tokenizer.encode(prompt).ids]
    stop = bundle.manifest["tokens"]["stop"]
    own = list(continue_tokens(lfmc.load(bundle.path), ids, count, stop))
    assert said == tokenizer.decode(own) + "\n"
