"""The tokens of a manifest must be those of the model, or an app would never stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfmc.bundle import manifest
from lfmc.bundle.bundle import Bundle
from lfmc.bundle.token_ids import check_tokens
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import GateError
from lfmc.exporter.export import export
from lfmc.exporter.reverify import reverify
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target


def exported(model: Path, output: Path, name: str = "onnx", **choices: str) -> Bundle:
    options = Options(bits="4", context=48, check="off", cache=False, target_options=choices)
    arguments = open_checkpoint(model), get_target(name), output, options
    return export(*arguments, force=False, progress=Silent())[0]


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return exported(tiny_checkpoint("lfm2"), tmp_path_factory.mktemp("tokens") / "bundle")


@pytest.mark.parametrize(("name", "wrong"), [("stop", [3]), ("bos", 7), ("pad", None)])
def test_wrong_tokens_in_a_manifest_are_an_error(bundle: Bundle, name: str, wrong: Any) -> None:
    check_tokens(bundle)
    tokens = {**bundle.manifest["tokens"], name: wrong}
    wrong_bundle = replace(bundle, manifest={**bundle.manifest, "tokens": tokens})
    with pytest.raises(GateError, match=f"another '{name}' token"):
        check_tokens(wrong_bundle)
    with pytest.raises(GateError, match=f"another '{name}' token"):
        reverify(wrong_bundle, None, Silent())


def test_a_bundle_of_another_model_is_an_error(
    bundle: Bundle, tiny_checkpoint: Callable[..., Path]
) -> None:
    other = open_checkpoint(tiny_checkpoint("lfm2", eos_token_id=[2, 9]))
    with pytest.raises(GateError, match="another 'stop' token") as excinfo:
        check_tokens(bundle, other)
    assert str(other.path) in str(excinfo.value)


def test_an_export_with_a_wrong_stop_id_leaves_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    special_tokens = manifest.special_tokens

    def wrong(checkpoint: Any) -> dict[str, Any]:
        return {**special_tokens(checkpoint), "stop": [5]}

    monkeypatch.setattr(manifest, "special_tokens", wrong)
    with pytest.raises(GateError, match="another 'stop' token"):
        exported(tiny_checkpoint("lfm2"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id", "eos_token_id"])
def test_wrong_tokens_in_the_genai_configuration_are_an_error(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    bundle = exported(tiny_checkpoint("lfm2"), tmp_path / "bundle", layout="genai")
    path = bundle.path / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"][key] = [3] if key.startswith("eos") else 3
    path.write_text(json.dumps(config))
    name = {"bos_token_id": "bos", "pad_token_id": "pad", "eos_token_id": "stop"}[key]
    with pytest.raises(GateError, match=rf"^genai_config.json has another '{name}' token"):
        check_tokens(bundle)


def test_a_file_may_have_a_pad_token_if_the_model_has_none(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_checkpoint("lfm2", pad_token_id=None)
    check_tokens(exported(model, tmp_path / "bundle", layout="genai"))


@pytest.mark.parametrize(
    ("method", "wrong", "name"), [("get_eos_ids", [5], "stop"), ("get_bos_id", 7, "bos")]
)
def test_a_program_with_wrong_tokens_is_not_exported(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    wrong: Any,
    name: str,
) -> None:
    target = pytest.importorskip("lfmc.targets.executorch.target")
    methods = target._runner_methods
    monkeypatch.setattr(target, "_runner_methods", lambda *args: {**methods(*args), method: wrong})
    with pytest.raises(GateError, match=f"^model.pte has another '{name}' token"):
        exported(tiny_checkpoint("lfm2"), tmp_path / "bundle", "executorch")
    assert not list(tmp_path.iterdir())
