"""Opening `tokenizer.json`, of a checkpoint or of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lfmc.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder; raise `InputError` if it can't be read."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError("the tokenizer can't be read", where=path, got=error) from error
