"""Names in a package, for those who write it and those who read it."""

from __future__ import annotations

import re

DECODE, PREFILL = "decode", "prefill"  # the functions
FACTS_KEY = "lfmc"  # in the metadata, as JSON: context, chunk, vocab_size, chosen


def identifier(name: str) -> str:
    """A name as ML programs may have it: letters, digits and underscores."""
    return re.sub(r"\W", "_", name)


def output_name(state: str) -> str:
    """The output that continues a state which is no MLState."""
    return f"{state}_out"
