"""A manifest's tokens are the model's: else an app would never stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfmc import exporter
from lfmc.bundle import Bundle
from lfmc.checkpoint import open_checkpoint
from lfmc.errors import GateError
from lfmc.exporter import Options, export
from lfmc.progress import Silent
from lfmc.reverify import reverify
from lfmc.targets.base import get_target
from lfmc.tokens import check_tokens


def exported(model: Path, output: Path) -> Bundle:
    options = Options(bits="4", context=48, check="off", cache=False)
    given = open_checkpoint(model), get_target("onnx"), output, options
    return export(*given, force=False, progress=Silent())[0]


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return exported(tiny_checkpoint("lfm2"), tmp_path_factory.mktemp("tokens") / "bundle")


@pytest.mark.parametrize(("name", "wrong"), [("stop", [3]), ("bos", 7), ("pad", None)])
def test_other_tokens_in_a_manifest_are_caught(bundle: Bundle, name: str, wrong: Any) -> None:
    check_tokens(bundle)
    tokens = {**bundle.manifest["tokens"], name: wrong}
    other = replace(bundle, manifest={**bundle.manifest, "tokens": tokens})
    with pytest.raises(GateError, match=f"another '{name}' token"):
        check_tokens(other)
    with pytest.raises(GateError, match=f"another '{name}' token"):
        reverify(other, None, Silent())


def test_a_bundle_of_another_model_is_told_apart(
    bundle: Bundle, tiny_checkpoint: Callable[..., Path]
) -> None:
    other = open_checkpoint(tiny_checkpoint("lfm2", eos_token_id=[2, 9]))
    with pytest.raises(GateError, match="another 'stop' token") as caught:
        check_tokens(bundle, other)
    assert str(other.path) in str(caught.value)


def test_an_export_with_a_wrong_stop_id_leaves_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporter.special_tokens

    def wrong(checkpoint: Any) -> dict[str, Any]:
        return {**right(checkpoint), "stop": [5]}

    monkeypatch.setattr(exporter, "special_tokens", wrong)
    with pytest.raises(GateError, match="another 'stop' token"):
        exported(tiny_checkpoint("lfm2"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
