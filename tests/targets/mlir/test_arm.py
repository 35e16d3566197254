"""A module for 64-bit Arm, executed by IREE's Arm runtime under qemu."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import iree.compiler.tools as compiler
import numpy as np
import pytest
import torch
from torch import Tensor

from lfmc.run.stepper import TorchStepper
from lfmc.targets.mlir.devices import DEVICES
from lfmc.targets.mlir.runtime import MODULE, RESET, SCOPE
from lfmc.targets.shared.parameters_file import PARAMETERS
from tests.factories import random_tokens
from tests.targets.lowering import Choose, Lowered
from tests.targets.programs import PROGRAMS
from tests.targets.runner import under_qemu, unpack_for_arm

DEVICE = "cpu:aarch64"
CALLS = (64, 8, 1, 1, 8, 1)


@pytest.fixture(scope="session")
def run_module(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of `iree-run-module` for Arm."""
    emulator, site = under_qemu(), tmp_path_factory.mktemp("arm")
    unpack_for_arm("iree-base-runtime", site)
    program = site / "iree" / "_runtime_libs" / "iree-run-module"
    program.chmod(0o755)
    return [*emulator, str(program), "--device=local-sync"]


@pytest.mark.arm
@pytest.mark.parametrize(("kind", "choose"), PROGRAMS)
def test_a_conversation(
    kind: str,
    choose: Choose,
    lowered: Callable[..., Lowered],
    run_module: list[str],
    tmp_path: Path,
) -> None:
    """Long calls, short calls and single tokens, repeated after a reset."""
    build = lowered(kind, choose, "mlir", device=DEVICE)
    config = build.checkpoint.config
    tokens = random_tokens(config, 1, sum(CALLS))[0]
    expected = TorchStepper(build.program.run, config, build.request.context).step(tokens)
    conversations = _run_conversations(build, [*run_module], tokens, tmp_path)
    scale = float(expected.abs().max())
    for logits in conversations:
        assert float((logits - expected).abs().max()) <= 1e-5 * scale


def _run_conversations(
    build: Lowered, command: list[str], tokens: Tensor, folder: Path
) -> list[Tensor]:
    """Return the logits of the tokens in two conversations of one process."""
    calls, position = [*CALLS, *CALLS], 0
    session = folder / "session.vmfb"
    flags = list(DEVICES[DEVICE].flags)
    text = _session(calls, build.checkpoint.config.vocab_size)
    compiler.compile_str(text, target_backends=[], extra_args=flags, output_file=str(session))
    command += [f"--module={build.folder / MODULE}", f"--module={session}", "--function=run"]
    command.append(f"--parameters={SCOPE}={build.folder / PARAMETERS}")
    for count in calls:
        start = position % len(tokens)
        ids = ",".join(map(str, tokens[start : start + count].tolist()))
        command += [f"--input={count}xi32={ids}", f"--input=1xi32={start}"]
        position += count
    files = [folder / f"{index}.npy" for index in range(len(calls))]
    command += [f"--output=@{file}" for file in files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = torch.cat([torch.from_numpy(np.load(file)) for file in files])
    return list(logits.split(len(tokens)))


def _session(calls: Sequence[int], vocab_size: int) -> str:
    """Return a module that calls the bundle's, as states end with the process of IREE's tool."""

    def name(count: int) -> str:
        return "@module.decode" if count == 1 else f"@module.score_{count}"

    def signature(count: int) -> str:
        return f"(tensor<{count}xi32>, tensor<1xi32>) -> tensor<{count}x{vocab_size}xf32>"

    lines = [f"func.func private {name(n)}{signature(n)}" for n in sorted(set(calls))]
    arguments = [f"%t{i}: tensor<{n}xi32>, %s{i}: tensor<1xi32>" for i, n in enumerate(calls)]
    results = ", ".join(f"tensor<{n}x{vocab_size}xf32>" for n in calls)
    lines.append(f"func.func private @module.{RESET}()")
    lines.append(f"func.func @run({', '.join(arguments)}) -> ({results}) {{")
    for index, count in enumerate(calls):
        if index % len(CALLS) == 0:
            lines.append(f"  call @module.{RESET}() : () -> ()")
        call = f"call {name(count)}(%t{index}, %s{index}) : {signature(count)}"
        lines.append(f"  %r{index} = {call}")
    values = ", ".join(f"%r{index}" for index in range(len(calls)))
    return "\n".join(["module @session {", *lines, f"  return {values} : {results}", "}", "}"])
