"""Names in a package that its writer and its readers share."""

from __future__ import annotations

import re

DECODE, PREFILL = "decode", "prefill"  # function names
FACTS_KEY = "lfmc"  # a metadata key; its JSON has context, chunk, vocab_size, chosen


def identifier(name: str) -> str:
    """Return a valid ML program name: letters, digits and underscores."""
    return re.sub(r"\W", "_", name)


def output_name(state: str) -> str:
    """Return the output name of a state that is not in MLState."""
    return f"{state}_out"
