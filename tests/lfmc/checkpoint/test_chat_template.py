"""Chat templates are found and rendered as transformers finds and renders them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from lfmc.checkpoint.chat_template import (
    LEGACY_TEMPLATE,
    OTHER_TEMPLATES,
    TEMPLATE,
    chat_prompt,
    render,
    special_token_texts,
)
from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.checkpoint.tokenizer import open_tokenizer
from lfmc.errors import InputError
from tests.lfmc.checkpoint.templates import TEMPLATES

HELLO = [{"role": "user", "content": "Hello {{ bos_token }}"}]
TURNS = [
    {"role": "user", "content": 'It\'s 5 < 6 & "so" — naïve?'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\nyes <b>it</b> is"},
    {"role": "user", "content": " and then? "},
]
CHATS: dict[str, list[dict[str, str]]] = {
    "one": HELLO,
    "system": [{"role": "system", "content": "Answer in 'one' word."}, *HELLO],
    "turns": TURNS,
    "long": [{"role": "system", "content": "be <brief>"}, *TURNS, *TURNS[1:]],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Say what the <weather> is & was.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint that a test may change."""
    return Path(shutil.copytree(demo_path(), tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    values = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def transformers_ids(folder: Path, chat: list[dict[str, str]], tools: Any = None) -> list[int]:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids: list[int] = tokenizer.apply_chat_template(
        chat, tools=tools, add_generation_prompt=True, return_dict=False
    )
    return ids


def assert_same_ids(folder: Path, chat: list[dict[str, str]], tools: Any = None) -> None:
    text = render(folder, chat, tools)
    assert text is not None
    ids = open_tokenizer(folder).encode(text, add_special_tokens=False).ids
    assert ids == transformers_ids(folder, chat, tools)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_those_of_transformers(folder: Path, name: str, chat: str) -> None:
    (folder / TEMPLATE).write_text(TEMPLATES[name])
    assert_same_ids(folder, CHATS[chat])
    assert_same_ids(folder, CHATS[chat], [TOOL, TOOL])


def test_the_legacy_map_of_special_tokens(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    tokens = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token")}
    edit_json(config, **dict.fromkeys(tokens), added_tokens_decoder=None)
    edit_json(folder / "special_tokens_map.json", **{k: {"content": v} for k, v in tokens.items()})
    assert special_token_texts(folder) == tokens
    (folder / TEMPLATE).write_text("{{ bos_token }}:{{ messages[0].content }}")
    assert_same_ids(folder, HELLO)
    assert str(render(folder, HELLO)).startswith("<|startoftext|>:")


def test_one_of_several_templates(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    named = [{"name": name, "template": f"{name}!"} for name in ("tool_use", "default")]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert render(folder, HELLO) == "default!"
    assert render(folder, HELLO, [TOOL]) == "tool_use!"
    assert_same_ids(folder, HELLO)
    assert_same_ids(folder, HELLO, [TOOL])


def test_several_templates_without_a_default_are_refused(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    named = [{"name": name, "template": f"{name}!"} for name in ("tool_use", "rag")]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(InputError, match="none is named 'default'"):
        render(folder, HELLO)


def test_template_files_replace_the_template_in_the_configuration(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="configured")
    (folder / TEMPLATE).write_text("file")
    (folder / OTHER_TEMPLATES).mkdir()
    (folder / OTHER_TEMPLATES / "tool_use.jinja").write_text("tools")
    assert render(folder, HELLO) == "file"
    assert render(folder, HELLO, [TOOL]) == "tools"
    assert_same_ids(folder, HELLO, [TOOL])


def test_the_file_of_older_processors(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    edit_json(folder / LEGACY_TEMPLATE, chat_template="legacy {{ messages[0].role }}")
    assert render(folder, HELLO) == "legacy user"
    assert chat_prompt(open_checkpoint(folder), folder) is None  # it has no place for the message


def test_renders_the_template_and_does_not_evaluate_content() -> None:
    assert render(demo_path(), HELLO) == (
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
