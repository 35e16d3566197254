"""The decoder that is exported: plain torch operators, explicit states, no mutation."""

from lfmc.model.config import DecoderConfig, Moe, Rope
from lfmc.model.decoder import Decoder, build_decoder
from lfmc.model.read_config import read_config
from lfmc.model.state import StateSpec, initial_state, state_specs

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
