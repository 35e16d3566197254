"""Tokenizer files in a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lfmc.checkpoint.chat_template import OTHER_TEMPLATES, TEMPLATE, render
from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.checkpoint.tokenizer_files import copy_tokenizer
from lfmc.errors import InputError

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint that a test may change."""
    return Path(shutil.copytree(demo_path(), tmp_path / "model"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_copies_all_tokenizer_files(bundle: Path) -> None:
    names = copy_tokenizer(open_checkpoint(), bundle)
    assert set(names) == {p.name for p in bundle.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", TEMPLATE, "generation_config.json"} <= set(
        names
    )


def test_writes_a_tokenizer_class_that_every_reader_supports(source: Path, bundle: Path) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "chat_template": "{{ messages[0].role }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / TEMPLATE).unlink()
    names = copy_tokenizer(open_checkpoint(source), bundle)
    written = json.loads((bundle / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert TEMPLATE in names
    assert render(bundle, HELLO) == "user"


def test_several_templates_become_files(source: Path, bundle: Path) -> None:
    (source / TEMPLATE).unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": name, "template": f"{name}!"} for name in ("default", "tool_use")
    ]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    names = copy_tokenizer(open_checkpoint(source), bundle)
    assert {TEMPLATE, f"{OTHER_TEMPLATES}/tool_use.jinja"} <= set(names)
    assert "chat_template" not in json.loads((bundle / "tokenizer_config.json").read_text())
    assert render(bundle, HELLO) == "default!"
    assert render(bundle, HELLO, [{}]) == "tool_use!"


def test_a_checkpoint_without_tokenizer_is_refused(source: Path, bundle: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        copy_tokenizer(open_checkpoint(source), bundle)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(
    source: Path, bundle: Path
) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    extra = {**tokenizer["added_tokens"][0], "id": 8192, "content": "<|extra|>"}
    tokenizer["added_tokens"].append(extra)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="the embedding does not have") as caught:
        copy_tokenizer(open_checkpoint(source), bundle)
    assert "<|extra|>" in str(caught.value)
    assert "8192" in str(caught.value)
