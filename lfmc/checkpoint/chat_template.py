"""Chat templates and tokenizer files: what turns an app's text into the model's tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfmc.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from lfmc.errors import InputError

TEMPLATE = "chat_template.jinja"
MESSAGE = "{message}"


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config; returns the names of the files.

    The tokenizer class is written as `PreTrainedTokenizerFast`: other names are refused by
    swift-transformers and transformers.js, and the file that matters is `tokenizer.json`. A chat
    template inside of `tokenizer_config.json` is written as a file of its own, which every reader
    finds. Raises `InputError` where there is no `tokenizer.json`.
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
                    "the checkpoint has several chat templates, and a bundle holds one",
                    where=source,
                    todo=f"write the one to ship to {TEMPLATE}, and take chat_template out",
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
    """The messages as the chat template writes them, ready for a reply; None without a template.

    Raises `InputError` where the template does not render.
    """
    path = folder / TEMPLATE
    if not path.is_file():
        return None
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: _text(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
        return template.render(messages=messages, add_generation_prompt=True, **special)
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError("the chat template can't be rendered", where=path, got=error) from error


def chat_prompt(checkpoint: Checkpoint, folder: Path) -> str | None:
    """What a model is given for one message, `{message}`, in a new conversation: for apps that
    render no templates.

    By the chat template in `folder`; without one, the start token and the message. None where the
    template does not have the message in it once, as it is.
    """
    rendered = render(folder, [{"role": "user", "content": MESSAGE}])
    if rendered is not None:
        return rendered if rendered.count(MESSAGE) == 1 else None
    bos = checkpoint.config.bos_id
    return ("" if bos is None else checkpoint.tokenizer().id_to_token(bos)) + MESSAGE


def _refuse(message: str) -> str:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _text(token: Any) -> str:
    """A special token, which older files write as an object."""
    return token.get("content", "") if isinstance(token, dict) else token or ""
