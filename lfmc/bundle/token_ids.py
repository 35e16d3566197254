"""The tokens that a bundle tells an app to begin and to stop with, against the model's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lfmc.bundle.bundle import MANIFEST, Bundle
from lfmc.checkpoint.checkpoint import Checkpoint, stop_ids
from lfmc.errors import GateError
from lfmc.model.read_config import read_config
from lfmc.targets.base import get_target

CONFIG = "config.json"


def special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says under `tokens`."""
    config = checkpoint.config
    return {"bos": config.bos_id, "pad": config.pad_id, "stop": list(checkpoint.stop_ids)}


@runtime_checkable
class TellsTokens(Protocol):
    """A target whose artifacts tell a runtime which tokens begin and end a text."""

    def stored_tokens(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Of each such file, `bos`, `pad` and `stop` as far as it has them."""


def check_tokens(bundle: Bundle, checkpoint: Checkpoint | None = None) -> None:
    """Raise `GateError` where the tokens of the manifest, or of an artifact's own files, are not
    those of the configuration files beside them, or of the checkpoint."""
    path = bundle.path / CONFIG
    config = read_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    stop = list(stop_ids(config, bundle.path))
    right = {str(path): {"bos": config.bos_id, "pad": config.pad_id, "stop": stop}}
    if checkpoint is not None:
        right[str(checkpoint.path)] = special_tokens(checkpoint)
    for source, expected in right.items():
        _compare(bundle.path, MANIFEST, bundle.manifest["tokens"], expected, source)
        target = get_target(bundle.target)
        if isinstance(target, TellsTokens):
            for name, told in target.stored_tokens(bundle.path).items():
                # What a model has none of, a file may be made to name: to fill up a batch.
                known = {own: expected[own] for own in told if expected[own] is not None}
                _compare(bundle.path, name, told, known, source)


def _compare(
    folder: Path, name: str, told: Mapping[str, Any], expected: Mapping[str, Any], source: str
) -> None:
    wrong = [own for own, value in expected.items() if told.get(own) != value]
    if wrong:
        raise GateError(
            f"{name} has another '{wrong[0]}' token than the model",
            where=folder / name,
            expected=f"{expected[wrong[0]]}, of {source}",
            got=told.get(wrong[0]),
            todo="an app would never begin, or stop, where it should: export it again",
        )
