"""Reads the rotary embeddings of a decoder from `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lfmc.errors import InputError
from lfmc.model.config import CONV, FULL, SLIDING, Llama3, Rope, Yarn
from lfmc.model.config_section import Section

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # of Lfm3Config
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
_TYPES = ("default", "proportional", "linear", "yarn", "llama3")


def read_ropes(section: Section, layer_types: tuple[str, ...], lfm3: bool) -> dict[str, Rope]:
    """Return the rotary embedding of each type of attention layer in `layer_types`.

    `lfm3` has settings by layer type, the other models have one for all. Raise `InputError` for a
    bad value, and for types whose frequencies depend on the length of the text (dynamic, longrope).
    """
    parameters = section.raw.get("rope_scaling") or section.raw.get("rope_parameters") or {}
    if lfm3:
        parameters = parameters or _DEFAULTS
    elif isinstance(parameters, dict):
        parameters = dict.fromkeys((FULL, SLIDING), parameters)
    ropes = {}
    for kind in sorted(set(layer_types) - {CONV}):
        settings = parameters.get(kind) if isinstance(parameters, dict) else None
        if not isinstance(settings, dict):
            raise InputError(f"config.json: 'rope_parameters' has no '{kind}'", where=section.where)
        if lfm3:  # transformers reads this key beside the settings by layer type, so finds none
            settings = {key: value for key, value in settings.items() if key != "truncate"}
        ropes[kind] = _rope(Section({**_outer_settings(section), **settings}, section.where), kind)
    return ropes


def _rope(settings: Section, kind: str) -> Rope:
    rope_type = settings.raw.get("rope_type", settings.raw.get("type", "default"))
    if rope_type not in _TYPES:
        raise InputError(
            f"config.json: the rotary embedding of '{kind}' layers is not supported",
            where=settings.where,
            expected=f"rope_type {', '.join(_TYPES)}",
            got=str(rope_type)[:80],
        )
    theta = settings.number("rope_theta", 1e6, minimum=1.0)
    partial = settings.number("partial_rotary_factor", 1.0)
    if rope_type == "default":
        return Rope(theta)  # transformers ignores all other settings
    factor = settings.number("factor", 1.0 if rope_type == "proportional" else ..., minimum=1e-6)
    if rope_type == "proportional":
        return Rope(theta, partial, factor)
    if partial != 1.0:
        raise InputError(
            f"config.json: rope_type '{rope_type}' rotates all dims",
            where=settings.where,
            expected="no partial_rotary_factor",
            got=partial,
        )
    if rope_type == "linear":
        return Rope(theta, factor=factor)
    length = settings.positive("original_max_position_embeddings")
    if rope_type == "yarn":
        return Rope(theta, scaling=_yarn(settings, factor, length, theta))
    low = settings.number("low_freq_factor", minimum=1e-6)
    high = settings.number("high_freq_factor", minimum=1e-6)
    if high <= low:
        raise InputError(
            "config.json: 'high_freq_factor' must be above 'low_freq_factor'",
            where=settings.where,
            got=f"{high:g} and {low:g}",
        )
    return Rope(theta, scaling=Llama3(factor, length, low, high))


def _yarn(settings: Section, factor: float, length: int, theta: float) -> Yarn:
    if theta <= 1:
        raise InputError("config.json: YaRN needs a 'rope_theta' above 1", where=settings.where)
    numbers = {
        key: settings.number(key, minimum=0.0 if key == "attention_factor" else 1e-6)
        for key in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
        if settings.raw.get(key) is not None
    }
    gain = numbers.get("attention_factor")
    if gain is None:
        scales = [numbers.get(key) or 1.0 for key in ("mscale", "mscale_all_dim")]
        gain = _attention_gain(factor, 1.0)
        if numbers.get("mscale") and numbers.get("mscale_all_dim"):
            gain = _attention_gain(factor, scales[0]) / _attention_gain(factor, scales[1])
    return Yarn(
        factor=factor,
        context=length,
        beta_fast=numbers.get("beta_fast") or 32.0,
        beta_slow=numbers.get("beta_slow") or 1.0,
        truncate=settings.get("truncate", bool, True),
        gain=gain,
    )


def _attention_gain(factor: float, scale: float) -> float:
    """Return the gain that YaRN's authors fitted, equation 22 of the paper."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _outer_settings(section: Section) -> dict[str, Any]:
    """Return settings that files store next to `rope_parameters`, used as its defaults."""
    keys = ("rope_theta", "partial_rotary_factor")
    settings = {key: section.raw[key] for key in keys if section.raw.get(key) is not None}
    length = "original_max_position_embeddings"
    settings[length] = section.raw.get(length) or section.raw.get(
        "max_position_embeddings", 128_000
    )
    return settings
