"""Reads how the authors of a checkpoint sample text, from `generation_config.json`."""

from __future__ import annotations

import math
from pathlib import Path

from lfmc.checkpoint.weight_files import read_json
from lfmc.errors import InputError

GENERATION_CONFIG = "generation_config.json"
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_sampling(folder: Path) -> dict[str, float]:
    """Return the settings of `SETTINGS` that a checkpoint recommends.

    If `do_sample` is false, decoding is greedy: `temperature` is 0, and only the repetition penalty
    applies. Returns {} for a checkpoint that states nothing. Raises `InputError` for a setting that
    is not a number.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    config = read_json(path)
    sampling: dict[str, float] = {}
    for key in SETTINGS:
        value = config.get(key)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise InputError(
                f"'{key}' is not a number of 0 or more", where=path, got=repr(value)[:80]
            )
        sampling[key] = value
    if config.get("do_sample") is False and sampling:
        penalty = sampling.get("repetition_penalty")
        sampling = {"temperature": 0.0}
        sampling |= {} if penalty is None else {"repetition_penalty": penalty}
    return sampling
