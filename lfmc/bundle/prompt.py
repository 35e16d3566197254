"""Text in and out of a bundle: token ids of a prompt, and text pieces of generated tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.chat_template import render
from lfmc.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def encode_prompt(
    bundle: Bundle, tokenizer: Tokenizer, prompt: str, *, chat: bool = False
) -> list[int]:
    """Return the token ids of a prompt, with the start token in front.

    With `chat` the prompt is the user's message in the model's chat template, which contains the
    start token. Raises `InputError` for a bundle without a template, or for a prompt of no tokens.
    """
    text, bos_id = prompt, bundle.manifest["tokens"]["bos"]
    if chat:
        rendered = render(bundle.path, [{"role": "user", "content": prompt}])
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
