"""What a cell's bundle depends on, as one key: the same key, the same bundle."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from lfmc.bundle import describe
from lfmc.cache import key_of, machine
from lfmc.check.config import Cell
from lfmc.checkpoint import TOKENIZER_FILES, Checkpoint
from lfmc.targets.base import get_target
from lfmc.versions import installed

RULE = "cell 1"
FILES = ("--text", "--plan")  # flags whose files count, not their names


def cell_key(cell: Cell, checkpoint: Checkpoint, folder: Path) -> str:
    """The key of a cell: lfmc's own code, the packages of its target, this kind of machine, the
    checkpoint, and every flag. Paths among the flags are relative to `folder`."""
    tokenizer = [
        [name, describe(checkpoint.path / name)["sha256"]]
        for name in TOKENIZER_FILES
        if (checkpoint.path / name).is_file()
    ]
    return key_of(
        RULE,
        code_digest(),
        sorted(versions(get_target(cell.target).extra).items()),
        machine(),
        [checkpoint.fingerprint, tokenizer],
        [cell.target, cell.isolated, _contents(cell.arguments, folder)],
    )


def _contents(arguments: tuple[str, ...], folder: Path) -> list[str]:
    """The flags, with the digest of a file in place of its name."""
    pairs = zip(("", *arguments), arguments, strict=False)
    return [
        describe(folder / own)["sha256"] if flag in FILES and (folder / own).is_file() else own
        for flag, own in pairs
    ]


def versions(extra: str) -> dict[str, str | None]:
    """Versions of the packages that lfmc, or an extra of it, asks for."""
    asked = map(Requirement, requires("lfmc") or ())
    return {
        own.name: installed(own.name)
        for own in asked
        if own.marker is None or any(own.marker.evaluate({"extra": e}) for e in ("", extra))
    }


@lru_cache
def code_digest() -> str:
    """SHA-256 over lfmc's own modules and data."""
    digest = hashlib.sha256()
    for package in ("lfmc", "lfmc.passes", "lfmc.targets", "lfmc.calib_free"):
        for folder in map(Path, import_module(package).__path__):
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".py", ".txt") and path.is_file():
                    digest.update(f"{package} {path.relative_to(folder)}\n".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()
