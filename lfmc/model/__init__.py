"""The decoder that is exported: plain torch operators, explicit states, no mutation.

`Decoder` and `build_decoder` import torch, which takes seconds. They are imported when they are
first used, so that commands that only read a configuration start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfmc.model.config import DecoderConfig, Moe, Rope
from lfmc.model.read_config import read_config
from lfmc.model.state import StateSpec, initial_state, state_specs

if TYPE_CHECKING:
    from lfmc.model.decoder import Decoder, build_decoder

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Moe",
    "Rope",
    "StateSpec",
    "build_decoder",
    "initial_state",
    "read_config",
    "state_specs",
]


def __getattr__(name: str) -> Any:
    if name in ("Decoder", "build_decoder"):
        from lfmc.model import decoder

        return getattr(decoder, name)
    raise AttributeError(f"module 'lfmc.model' has no attribute '{name}'")
