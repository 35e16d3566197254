"""QNN by way of ExecuTorch, where QNN_SDK_ROOT names an SDK that it works with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError
from lfmc.targets.base import Request, choose_options, get_target
from lfmc.targets.qualcomm.delegate import LIBRARIES, LOADED, SDK_ROOT, sdk_root
from tests.targets.lowering import Choose, Lowered
from tests.targets.matrix import assert_starts_over
from tests.targets.qualcomm.programs import both, halves

Make = Callable[..., Lowered]
PROGRAMS = [("lfm2-conv-bias", both), ("lfm2_moe-scaled", both), ("lfm3-attention-bias", both)]
needs_sdk = pytest.mark.skipif(
    sdk_root() is None, reason=f"{SDK_ROOT} names no SDK of Qualcomm's: make test-qualcomm"
)


@needs_sdk
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_every_operator(lowered: Make, name: str, choose: Choose) -> None:
    made = lowered(name, choose, "qualcomm", runtime="executorch", chunk="16")
    made.program.bind(made.weights.value)
    same, operators = made.target.operator_parity(made.program, made.folder, made.artifact)
    assert same.passed, same
    assert operators.passed, operators
    assert {"attention", "attention.scores", "conv_#"} <= {case.case for case in operators.cases}
    assert {"decode.pte", "prefill.pte"} < set(made.artifact.beside)


@needs_sdk
def test_floats(lowered: Make) -> None:
    options = {"runtime": "executorch", "activations": "float16", "chunk": "16"}
    made = lowered("lfm2-untied", halves, "qualcomm", **options)
    made.program.bind(made.weights.value)
    (together,) = made.target.operator_parity(made.program, made.folder, made.artifact)
    assert together.passed, together


@needs_sdk
def test_it_starts_over(lowered: Make) -> None:
    made = lowered("lfm3-attention-bias", both, "qualcomm", runtime="executorch", chunk="16")
    assert_starts_over(made, 16)


def test_an_sdk_is_a_folder_with_its_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(SDK_ROOT, str(tmp_path))
    assert sdk_root() is None
    (tmp_path / LIBRARIES).mkdir(parents=True)
    (tmp_path / LIBRARIES / LOADED[-1]).touch()
    assert sdk_root() == tmp_path


def test_what_can_not_be_is_told(
    any_checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SDK_ROOT, "")
    target, config = get_target("qualcomm"), any_checkpoint("lfm2").config
    asked = Request(96, choose_options(target, {"runtime": "executorch"}))
    with pytest.raises(UnsupportedError, match=SDK_ROOT):
        target.check(config, asked)
    reason = target.why_not_here(asked)
    assert reason is not None
    assert SDK_ROOT in reason
    edge = Request(96, {**asked.options, "stage": "edge"})
    with pytest.raises(UnsupportedError, match="nothing to ship without it"):
        target.check(config, edge)
