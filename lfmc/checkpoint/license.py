"""Finds the license of a checkpoint, and the model that it is based on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_CARD = "README.md"
LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*\n", re.DOTALL)


@dataclass(frozen=True)
class License:
    """What the model card and the files of a checkpoint state; None for what they do not state.

    `identifier` is that of the hub, such as "apache-2.0", or "other" with a `name`. `files` are
    names of license files and notices in the folder of the checkpoint.
    """

    identifier: str | None
    name: str | None
    link: str | None
    base_model: str | None
    files: tuple[str, ...]

    def __str__(self) -> str:
        """Return the license in a few words."""
        if self.name is not None:
            return self.name
        if self.identifier is not None:
            return self.identifier
        return f"see {', '.join(self.files)}" if self.files else "not stated by the checkpoint"


def read_license(folder: Path) -> License:
    """Read the metadata of the model card and list the license files of a checkpoint.

    A model card without readable metadata states nothing.
    """
    metadata = read_metadata(folder / MODEL_CARD)
    texts = {key: value for key, value in metadata.items() if isinstance(value, str) and value}
    base_model = metadata.get("base_model")
    if isinstance(base_model, list) and base_model:
        base_model = str(base_model[0])
    files = {path.name for pattern in LICENSE_FILES for path in folder.glob(pattern)}
    return License(
        identifier=texts.get("license"),
        name=texts.get("license_name"),
        link=texts.get("license_link"),
        base_model=base_model if isinstance(base_model, str) else None,
        files=tuple(sorted(name for name in files if (folder / name).is_file())),
    )


def read_metadata(card: Path) -> Mapping[str, Any]:
    """Return the YAML metadata at the start of a model card, or {} if there is none."""
    import yaml

    if not card.is_file():
        return {}
    match = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
