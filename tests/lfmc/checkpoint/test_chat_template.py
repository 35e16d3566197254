"""Tokenizer files and chat templates in a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lfmc.checkpoint.chat_template import TEMPLATE, copy_tokenizer, render
from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.errors import InputError

HELLO = [{"role": "user", "content": "Hello {{ bos_token }}"}]


def test_copies_all_tokenizer_files(tmp_path: Path) -> None:
    names = copy_tokenizer(open_checkpoint(), tmp_path)
    assert set(names) == {p.name for p in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", TEMPLATE, "generation_config.json"} <= set(
        names
    )


def test_writes_a_tokenizer_class_that_every_reader_supports(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(demo_path(), source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "chat_template": "{{ messages[0].role }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / TEMPLATE).unlink()
    (tmp_path / "out").mkdir()
    names = copy_tokenizer(open_checkpoint(source), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert TEMPLATE in names
    assert render(tmp_path / "out", HELLO) == "user"


def test_renders_the_template_and_does_not_evaluate_content(tmp_path: Path) -> None:
    copy_tokenizer(open_checkpoint(), tmp_path)
    text = render(tmp_path, HELLO)
    assert text == (
        "<|startoftext|><|im_start|>user\nHello {{ bos_token }}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_render_returns_none_without_a_template(tmp_path: Path) -> None:
    assert render(tmp_path, HELLO) is None


@pytest.mark.parametrize("template", ["{{ messages[", "{{ raise_exception('no') }}"])
def test_a_broken_template_is_an_input_error(tmp_path: Path, template: str) -> None:
    (tmp_path / TEMPLATE).write_text(template)
    with pytest.raises(InputError, match="can't be rendered"):
        render(tmp_path, HELLO)


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="can't be rendered"):
        render(tmp_path, HELLO)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(demo_path(), source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        copy_tokenizer(open_checkpoint(source), tmp_path)
