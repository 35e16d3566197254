"""A hook of mkdocs: the package as it installs, for mkdocstrings, which reads source only.

`passes/`, `targets/` and `calib_free/` lie beside `lfmc/` in the repository and install inside of
it (pyproject.toml); `build/docs/lfmc` is that tree, made of links.
"""

from __future__ import annotations

import shutil
from pathlib import Path

BESIDE = ("passes", "targets", "calib_free")


def on_startup(command: str, dirty: bool) -> None:
    """Lay the tree anew; mkdocs calls this before plugins look for it."""
    root = Path(__file__).parents[2]
    lay(root, root / "build" / "docs" / "lfmc")


def lay(root: Path, package: Path) -> None:
    """Make `package` a folder of links to what the package `lfmc` has."""
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (*(root / "lfmc").iterdir(), *(root / name for name in BESIDE)):
        (package / entry.name).symlink_to(entry)
