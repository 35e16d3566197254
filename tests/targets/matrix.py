"""Checks of running artifacts and of exports that the tests of all targets share."""

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
from lfmc.run.generate import continue_tokens
from lfmc.run.stepper import Stepper, TorchStepper
from lfmc.targets.base import get_target
from tests.factories import random_tokens
from tests.targets.lowering import Lowered


def assert_matrix(build: Lowered, stepper: Stepper) -> None:
    """The full parity matrix agrees with torch on the same quantized weights, to 1e-5."""
    rung = build.run_matrix(stepper, build.in_torch, tolerance=1e-5)
    assert rung.passed, rung


def assert_starts_over(build: Lowered, chunk: int) -> None:
    """A reset clears all states, and a text in pieces gives the same logits as the whole text."""
    tokens = random_tokens(build.checkpoint.config, 1, 2 * chunk + 4)[0]
    stepper = build.target.run(build.folder)
    first = stepper.step(tokens)
    stepper.step(tokens[: chunk // 2])
    stepper.reset()
    pieces = [stepper.step(tokens[:chunk]), stepper.step(tokens[chunk:])]
    assert torch.equal(torch.cat(pieces), first)


def assert_context_ends(build: Lowered) -> None:
    """The whole context can be used; a token beyond it and an invalid token are refused."""
    config, context = build.checkpoint.config, build.request.context
    tokens = random_tokens(config, 1, context)[0]
    stepper = build.target.run(build.folder)
    actual = torch.cat([stepper.step(tokens[:50]), stepper.step(tokens[50:])])
    expected = TorchStepper(build.program.run, config, context).step(tokens)
    assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(InputError, match="longer than the exported context"):
        stepper.step([1])
    stepper.reset()
    with pytest.raises(InputError, match="outside of the vocabulary"):
        stepper.step([config.vocab_size])


def export_checked(
    name: str, output: Path, bits_per_weight: float, model: Path, **options: str
) -> Bundle:
    """Export a checkpoint for 128 tokens; check parity and budget."""
    request_options = Options(
        budget=Budget(bits_per_weight=bits_per_weight),
        context=128,
        target_options=options,
        check="fast",
    )
    checkpoint, target = open_checkpoint(model), get_target(name)
    bundle, report = export(
        checkpoint, target, output, request_options, force=False, progress=Silent()
    )
    assert report.verification is not None
    assert all(rung.passed for rung in report.verification.rungs)
    assert report.nbytes <= (report.plan.limit_nbytes or 0)
    return bundle


def assert_example_agrees(bundle: Bundle) -> None:
    """A target's `generate.py`, which does not import lfmc, continues a text as lfmc does."""
    example = Path(__file__).parents[2] / "examples" / bundle.target / "generate.py"
    prompt, count = "Once upon a time", 12
    command = [sys.executable, str(example), str(bundle.path), prompt, str(count)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokenizer = open_checkpoint().tokenizer()
    ids = [bundle.manifest["tokens"]["bos"], *tokenizer.encode(prompt).ids]
    stop = bundle.manifest["tokens"]["stop"]
    expected = list(continue_tokens(lfmc.load(bundle.path), ids, count, stop))
    assert output == tokenizer.decode(expected) + "\n"
