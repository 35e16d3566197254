"""A hook of mkdocs: the package as it installs, for mkdocstrings, which reads source only.

`passes/`, `targets/` and `calib_free/` lie beside `lfmc/` in the repository and install inside of
it (pyproject.toml); `build/docs/lfmc` is that tree, made of links.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

BESIDE = ("passes", "targets", "calib_free")


def on_config(config: Any) -> Any:
    """Lay the tree anew; mkdocs calls this before it reads a page."""
    root = Path(config["docs_dir"]).parent
    lay(root, root / "build" / "docs" / "lfmc")
    return config


def lay(root: Path, package: Path) -> None:
    """Make `package` a folder of links to what the package `lfmc` has."""
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (*(root / "lfmc").iterdir(), *(root / name for name in BESIDE)):
        (package / entry.name).symlink_to(entry)
