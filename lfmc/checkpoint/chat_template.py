"""Copies the tokenizer files of a checkpoint and renders its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfmc.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from lfmc.errors import InputError

TEMPLATE = "chat_template.jinja"
MESSAGE = "{message}"


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config; return the names of the files.

    `tokenizer_class` becomes `PreTrainedTokenizerFast`: swift-transformers and transformers.js
    refuse other names, and the vocabulary is in `tokenizer.json` anyway. A chat template inside
    `tokenizer_config.json` is also written to its own file, because some readers look only there.
    Raises `InputError` if the checkpoint has no `tokenizer.json`, or has several chat templates.
    """
    checkpoint.tokenizer()
    written = []
    for name in TOKENIZER_FILES:
        source = checkpoint.path / name
        if not source.is_file():
            continue
        text = _read(source)
        if name == "tokenizer_config.json":
            settings = _parse(source, text)
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            template = settings.get("chat_template")
            if template is not None and not isinstance(template, str):
                raise InputError(
                    "the checkpoint has several chat templates, but a bundle can contain only one",
                    where=source,
                    todo=f"write the template to ship to {TEMPLATE}, and remove chat_template",
                )
            if template is not None and not (checkpoint.path / TEMPLATE).is_file():
                (folder / TEMPLATE).write_text(template, encoding="utf-8")
                written.append(TEMPLATE)
            text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
        written.append(name)
    config = (checkpoint.path / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config, encoding="utf-8")
    return [*written, "config.json"]


def add_settings(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Add keys to the JSON files of a folder; return the names of the files that are new."""
    new = []
    for name, values in settings.items():
        path = folder / name
        if path.is_file():
            values = {**_parse(path, _read(path)), **values}
        else:
            new.append(name)
        text = json.dumps(values, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    return new


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path)
    return value


def render(folder: Path, messages: Sequence[dict[str, str]]) -> str | None:
    """Render the messages with the chat template, up to the start of the model's reply.

    Returns None if `folder` has no template. Raises `InputError` if the template can't be rendered.
    """
    path = folder / TEMPLATE
    if not path.is_file():
        return None
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special_tokens = {
        key: _token_text(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")
    }
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
        return template.render(messages=messages, add_generation_prompt=True, **special_tokens)
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError("the chat template can't be rendered", where=path, got=error) from error


def chat_prompt(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Return the prompt of a new conversation, with `{message}` as the user's only message.

    Apps that can't render a chat template replace `{message}`. The prompt comes from the chat
    template in `folder`; without a template, it is the start token and the message. Returns None
    if the rendered prompt does not contain the message exactly once and unchanged.
    """
    rendered = render(folder, [{"role": "user", "content": MESSAGE}])
    if rendered is not None:
        return rendered if rendered.count(MESSAGE) == 1 else None
    bos = checkpoint.config.bos_id
    return ("" if bos is None else checkpoint.tokenizer().id_to_token(bos)) + MESSAGE


def _raise_template_error(message: str) -> str:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _token_text(token: Any) -> str:
    """Return the text of a special_tokens token; older files store it in an object."""
    return token.get("content", "") if isinstance(token, dict) else token or ""
