"""Finds and renders the chat templates of a folder like `tokenizer.apply_chat_template`.

The environment, the template that is chosen and the special tokens are those of transformers 5.23
(`utils/chat_template_utils.py`, `tokenization_utils_base.py`), so the token ids are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import read_json, read_text
from lfmc.errors import InputError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = "chat_template.jinja"
OTHER_TEMPLATES = "additional_chat_templates"  # a folder with NAME.jinja
LEGACY_TEMPLATE = "chat_template.json"
DEFAULT, TOOL_USE = "default", "tool_use"
MESSAGE = "{message}"


def read_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by name; a single template is named "default".

    Template files replace the templates in `tokenizer_config.json`. `chat_template.json`, which
    older processors wrote, is read if there is no other template. Raises `InputError` if a file
    can't be read, or if none of several templates is named "default".
    """
    files = sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))
    templates: dict[str, Any] = {path.stem: read_text(path) for path in files}
    if (folder / TEMPLATE).is_file():
        templates[DEFAULT] = read_text(folder / TEMPLATE)
    source = folder / "tokenizer_config.json"
    if not templates and source.is_file():
        templates = _by_name(read_json(source).get("chat_template"))
    if not templates and (folder / LEGACY_TEMPLATE).is_file():
        source = folder / LEGACY_TEMPLATE
        templates = _by_name(read_json(source).get("chat_template"))
    if not all(isinstance(template, str) for template in templates.values()):
        raise InputError("a chat template is not text", where=source)
    if templates and DEFAULT not in templates:
        raise InputError(
            "the checkpoint has several chat templates, and none is named 'default'",
            where=folder,
            got=", ".join(sorted(templates)),
            todo=f"write the template of ordinary chats to {TEMPLATE}",
        )
    return templates


def render(
    folder: Path,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str | None:
    """Render the messages with the chat template, up to the start of the model's reply.

    `tools` are JSON schemas of functions; a template named "tool_use" is then preferred. Returns
    None if `folder` has no template. Raises `InputError` if the template can't be rendered.
    """
    templates = read_templates(folder)
    if not templates:
        return None
    template = templates.get(TOOL_USE, templates[DEFAULT]) if tools else templates[DEFAULT]
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **special_token_texts(folder),
            )
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError("the chat template can't be rendered", where=folder, got=error) from error


def special_token_texts(folder: Path) -> dict[str, str]:
    """Return the special tokens that a template can use, such as `bos_token`.

    They are in `tokenizer_config.json`. Older checkpoints, whose `tokenizer_config.json` has no
    `added_tokens_decoder`, have them in `special_tokens_map.json`.
    """
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and legacy.is_file():
        settings = {**settings, **read_json(legacy)}
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    extra = settings.get("extra_special_tokens")
    tokens |= extra if isinstance(extra, dict) else {}
    texts = {key: _token_text(value) for key, value in tokens.items()}
    return {key: text for key, text in texts.items() if text is not None}


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


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of transformers: its settings, tags, filters and functions."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}...{% endgeneration %}`, which marks the model's replies."""

        tags = {"generation"}  # noqa: RUF012 (the type of the base class)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("render_block")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def render_block(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _by_name(templates: Any) -> dict[str, Any]:
    """Return templates by name from a JSON value: one template, a list of named ones, or null."""
    if isinstance(templates, list):
        return {str(entry.get("name")): entry.get("template") for entry in templates}
    if isinstance(templates, dict):
        return templates
    return {} if templates is None else {DEFAULT: templates}


def _token_text(token: Any) -> str | None:
    """Return the text of a special token; older files store it in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
