"""The tokens that a bundle tells an app to begin and to stop with, against the model's own."""

from __future__ import annotations

import json
from typing import Any

from lfmc.bundle import Bundle
from lfmc.checkpoint import Checkpoint, stop_ids
from lfmc.errors import GateError
from lfmc.model.config import read_config

CONFIG = "config.json"


def special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says under `tokens`."""
    config = checkpoint.config
    return {"bos": config.bos_id, "pad": config.pad_id, "stop": list(checkpoint.stop_ids)}


def check_tokens(bundle: Bundle, checkpoint: Checkpoint | None = None) -> None:
    """Raise `GateError` where the manifest's tokens are not those of the configuration files beside
    it, or of the checkpoint."""
    path = bundle.path / CONFIG
    config = read_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    stop = list(stop_ids(config, bundle.path))
    sources = {str(path): {"bos": config.bos_id, "pad": config.pad_id, "stop": stop}}
    if checkpoint is not None:
        sources[str(checkpoint.path)] = special_tokens(checkpoint)
    for source, expected in sources.items():
        found = bundle.manifest["tokens"]
        wrong = [name for name, value in expected.items() if found.get(name) != value]
        if wrong:
            raise GateError(
                f"the manifest has another '{wrong[0]}' token than the model",
                where=f"{bundle.path}: manifest.json, tokens",
                expected=f"{expected[wrong[0]]}, of {source}",
                got=found.get(wrong[0]),
                todo="an app would never begin, or stop, where it should: export it again",
            )
