"""Checks the begin, pad and stop tokens of a bundle against those of the model."""

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
    """Return the `tokens` section of a manifest."""
    config = checkpoint.config
    return {"bos": config.bos_id, "pad": config.pad_id, "stop": list(checkpoint.stop_ids)}


@runtime_checkable
class StoresTokens(Protocol):
    """A target whose artifacts store the begin and stop tokens for a runtime."""

    def stored_tokens(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Return, by file name, those of `bos`, `pad` and `stop` that the file stores."""


def check_tokens(bundle: Bundle, checkpoint: Checkpoint | None = None) -> None:
    """Raise `GateError` if the bundle's tokens differ from its configuration or the checkpoint.

    The bundle's tokens are those of the manifest and of the artifact's files.
    """
    path = bundle.path / CONFIG
    config = read_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    stop = list(stop_ids(config, bundle.path))
    tokens_by_source = {str(path): {"bos": config.bos_id, "pad": config.pad_id, "stop": stop}}
    if checkpoint is not None:
        tokens_by_source[str(checkpoint.path)] = special_tokens(checkpoint)
    for source, expected in tokens_by_source.items():
        _compare(bundle.path, MANIFEST, bundle.manifest["tokens"], expected, source)
        target = get_target(bundle.target)
        if isinstance(target, StoresTokens):
            for name, tokens in target.stored_tokens(bundle.path).items():
                # A file may require a token that the model lacks, such as a pad token for batches.
                required = {key: expected[key] for key in tokens if expected[key] is not None}
                _compare(bundle.path, name, tokens, required, source)


def _compare(
    folder: Path, name: str, tokens: Mapping[str, Any], expected: Mapping[str, Any], source: str
) -> None:
    wrong = [key for key, value in expected.items() if tokens.get(key) != value]
    if wrong:
        raise GateError(
            f"{name} has another '{wrong[0]}' token than the model",
            where=folder / name,
            expected=f"{expected[wrong[0]]}, of {source}",
            got=tokens.get(wrong[0]),
            todo="an app would begin or stop at the wrong token: export it again",
        )
