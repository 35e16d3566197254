"""What a cell's bundle depends on, as one key: the same key, the same bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from lfmc.bundle.bundle import describe
from lfmc.check.config import Cell
from lfmc.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from lfmc.machine.cache import key_of, machine
from lfmc.machine.isolated import REFERENCE
from lfmc.machine.versions import installed
from lfmc.targets.base import get_target

RULE = "cell 1"
OWN = ("lfmc", "lfmc.passes", "lfmc.targets", "lfmc.calib_free")
FILES = ("--text", "--plan")  # flags whose files count, not their names


def cell_key(cell: Cell, checkpoint: Checkpoint, folder: Path, packages: Sequence[str]) -> str:
    """The key of a cell: lfmc's own code, the packages that it runs with, this kind of machine, the
    checkpoint, and every flag. Paths among the flags are relative to `folder`."""
    tokenizer = [
        [name, describe(checkpoint.path / name)["sha256"]]
        for name in TOKENIZER_FILES
        if (checkpoint.path / name).is_file()
    ]
    target = get_target(cell.target)
    return key_of(
        RULE,
        code_digest(type(target).__module__.partition(".")[0]),
        list(packages),
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


def versions(extra: str) -> list[str]:
    """The packages that lfmc, an extra of it, and rung 1 ask for, with their versions here."""
    asked, wanted = map(Requirement, requires("lfmc") or ()), ("", extra, REFERENCE)
    return sorted(
        f"{own.name}=={installed(own.name)}"
        for own in asked
        if own.marker is None or any(own.marker.evaluate({"extra": e}) for e in wanted)
    )


@lru_cache
def code_digest(package: str) -> str:
    """SHA-256 over lfmc's own modules and data, and those of the package that brings a target."""
    digest = hashlib.sha256()
    for name in dict.fromkeys((*OWN, package)):
        module = import_module(name)
        for place in map(Path, getattr(module, "__path__", None) or [module.__file__ or ""]):
            for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
                if path.suffix in (".py", ".txt") and path.is_file():
                    digest.update(f"{name} {path.name}\n".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()
