"""The cache key of a cell: a hash over everything that its bundle depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from lfmc.bundle.bundle import describe_file
from lfmc.check.config import Cell
from lfmc.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from lfmc.machine.cache import cache_key, numeric_environment
from lfmc.machine.isolated import REFERENCE
from lfmc.machine.versions import installed_version
from lfmc.targets.base import get_target

RULE = "cell 1"
LFMC_PACKAGES = ("lfmc", "lfmc.passes", "lfmc.targets", "lfmc.calib_free")
FILE_FLAGS = ("--text", "--plan")  # the key contains hashes of these files, not their names


def cell_key(cell: Cell, checkpoint: Checkpoint, folder: Path, packages: Sequence[str]) -> str:
    """Return the cache key of a cell.

    The key depends on lfmc's code, `packages` (names with versions), this kind of machine, the
    checkpoint, and all flags. Paths among the flags are relative to `folder`.
    """
    tokenizer = [
        [name, describe_file(checkpoint.path / name)["sha256"]]
        for name in TOKENIZER_FILES
        if (checkpoint.path / name).is_file()
    ]
    target = get_target(cell.target)
    return cache_key(
        RULE,
        code_digest(type(target).__module__.partition(".")[0]),
        list(packages),
        numeric_environment(),
        [checkpoint.fingerprint, tokenizer],
        [cell.target, cell.isolated, _hash_files(cell.arguments, folder)],
    )


def _hash_files(arguments: tuple[str, ...], folder: Path) -> list[str]:
    """Return the arguments with the names of files replaced by their SHA-256."""
    return [
        describe_file(folder / value)["sha256"]
        if flag in FILE_FLAGS and (folder / value).is_file()
        else value
        for flag, value in zip(("", *arguments), arguments, strict=False)
    ]


def package_versions(extra: str) -> list[str]:
    """Return `NAME==VERSION` of the packages that lfmc, `extra` and parity rung 1 require."""
    extras = ("", extra, REFERENCE)
    return sorted(
        f"{requirement.name}=={installed_version(requirement.name)}"
        for requirement in map(Requirement, requires("lfmc") or ())
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": name}) for name in extras)
    )


@lru_cache
def code_digest(package: str) -> str:
    """Return the SHA-256 of the modules and data of lfmc and of the target's `package`."""
    digest = hashlib.sha256()
    for name in dict.fromkeys((*LFMC_PACKAGES, package)):
        module = import_module(name)
        for root in map(Path, getattr(module, "__path__", None) or [module.__file__ or ""]):
            for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
                if path.suffix in (".py", ".txt") and path.is_file():
                    digest.update(f"{name} {path.name}\n".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()
