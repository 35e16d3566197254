"""A mkdocs hook that builds the package tree as installed, for mkdocstrings.

`passes/`, `targets/` and `calib_free/` are next to `lfmc/` in the repository, but install inside
`lfmc` (see pyproject.toml). mkdocstrings only reads sources, so the hook creates the installed tree
as symbolic links in `build/docs/lfmc`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDERS = ("passes", "targets", "calib_free")


def on_startup(command: str, dirty: bool) -> None:
    """Create the tree; mkdocs calls this before the plugins run."""
    root = Path(__file__).parents[2]
    create_tree(root, root / "build" / "docs" / "lfmc")


def create_tree(root: Path, package: Path) -> None:
    """Replace the folder `package` by links to the modules of `lfmc`."""
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (*(root / "lfmc").iterdir(), *(root / name for name in FOLDERS)):
        (package / entry.name).symlink_to(entry)
