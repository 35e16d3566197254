"""Text in and out of a bundle: token ids of a prompt, and text pieces of generated tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.chat_template import TEMPLATE, render
from lfmc.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def uses_template(
    bundle: Bundle, *, raw: bool = False, chat: bool = False, system: str | None = None
) -> bool:
    """Return whether a prompt is a message in the model's chat template.

    By default it is if the bundle has a template. `raw` says that the prompt is plain text; `chat`
    and a `system` message need a template.

    Raises `InputError` for options that contradict each other, or if the template is missing.
    """
    has_template = (bundle.path / TEMPLATE).is_file()
    if raw:
        for name, is_set in (("chat", chat), ("system", system is not None)):
            if is_set:
                raise InputError(
                    f"{name} and raw exclude each other",
                    todo=f"leave out raw to use the chat template, or leave out {name}",
                )
        return False
    if not has_template and (chat or system is not None):
        raise InputError(
            "the bundle has no chat template",
            where=bundle.path,
            expected=TEMPLATE,
            todo="leave out chat and system: the model then continues the prompt as plain text",
        )
    return has_template


def encode_prompt(
    bundle: Bundle,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    template: bool = False,
    system: str | None = None,
) -> list[int]:
    """Return the token ids of a prompt, with the start token in front.

    With `template`, the prompt is the user's message in the model's chat template, which contains
    the start token; a `system` message comes before it. Raises `InputError` for a bundle without a
    template, or for a prompt of no tokens.
    """
    text, bos_id = prompt, bundle.manifest["tokens"]["bos"]
    if template:
        messages = [] if system is None else [{"role": "system", "content": system}]
        rendered = render(bundle.path, [*messages, {"role": "user", "content": prompt}])
        if rendered is None:
            raise InputError("the bundle has no chat template", where=bundle.path)
        text, bos_id = rendered, None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids if bos_id is None else [bos_id, *ids]
    if not ids:
        raise InputError("the prompt is empty, and the model has no start token")
    return ids


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as soon as it is complete: a character may take several tokens."""
    from tokenizers.decoders import DecodeStream

    stream, ids, nchars = DecodeStream(skip_special_tokens=True), [], 0
    for token in tokens:
        ids.append(token)
        piece = stream.step(tokenizer, token)
        if piece:
            nchars += len(piece)
            yield piece
    remainder = tokenizer.decode(ids)[nchars:]  # bytes that do not form a character
    if remainder:
        yield remainder
