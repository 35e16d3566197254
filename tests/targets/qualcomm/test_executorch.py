"""QNN through ExecuTorch, if QNN_SDK_ROOT is the path of an SDK that works with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError
from lfmc.targets.base import Request, choose_options, get_target
from lfmc.targets.qualcomm.delegate import LIBRARIES, LIBRARY_FOLDER, SDK_ROOT, sdk_root
from tests.targets.lowering import Choose, Lowered
from tests.targets.matrix import assert_starts_over
from tests.targets.qualcomm.programs import float16, mixed_bits

Make = Callable[..., Lowered]
PROGRAMS = [
    ("lfm2-conv-bias", mixed_bits),
    ("lfm2_moe-scaled", mixed_bits),
    ("lfm3-attention-bias", mixed_bits),
]
needs_sdk = pytest.mark.skipif(
    sdk_root() is None, reason=f"there is no SDK at {SDK_ROOT}: make test-qualcomm"
)


@needs_sdk
@pytest.mark.parametrize(("name", "choose"), PROGRAMS)
def test_every_operator_agrees_with_torch(lowered: Make, name: str, choose: Choose) -> None:
    build = lowered(name, choose, "qualcomm", runtime="executorch", chunk="16")
    same_graphs, operators = build.target.operator_parity(
        build.program, build.folder, build.artifact
    )
    assert same_graphs.passed, same_graphs
    assert operators.passed, operators
    assert {"attention", "attention.scores", "conv_#"} <= {case.case for case in operators.cases}
    assert {"decode.pte", "prefill.pte"} < set(build.artifact.beside)


@needs_sdk
def test_float16_logits_agree_with_torch(lowered: Make) -> None:
    options = {"runtime": "executorch", "activations": "float16", "chunk": "16"}
    build = lowered("lfm2-untied", float16, "qualcomm", **options)
    (logits,) = build.target.operator_parity(build.program, build.folder, build.artifact)
    assert logits.passed, logits


@needs_sdk
def test_a_conversation_starts_over(lowered: Make) -> None:
    build = lowered("lfm3-attention-bias", mixed_bits, "qualcomm", runtime="executorch", chunk="16")
    assert_starts_over(build, 16)


def test_an_sdk_is_a_folder_with_its_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(SDK_ROOT, str(tmp_path))
    assert sdk_root() is None
    (tmp_path / LIBRARY_FOLDER).mkdir(parents=True)
    (tmp_path / LIBRARY_FOLDER / LIBRARIES[-1]).touch()
    assert sdk_root() == tmp_path


def test_a_missing_sdk_is_reported(
    any_checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SDK_ROOT, "")
    target, config = get_target("qualcomm"), any_checkpoint("lfm2").config
    request = Request(96, choose_options(target, {"runtime": "executorch"}))
    with pytest.raises(UnsupportedError, match=SDK_ROOT):
        target.check(config, request)
    reason = target.why_not_here(request)
    assert reason is not None
    assert SDK_ROOT in reason
    edge = Request(96, {**request.options, "stage": "edge"})
    with pytest.raises(UnsupportedError, match="so it has no stage=edge"):
        target.check(config, edge)
