"""The bundle: one folder with everything an app needs, written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmc.errors import GateError, InputError

MANIFEST = "manifest.json"
PLAN = "plan.json"
GOLDEN = "golden.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Bundle:
    """A finished bundle on disk and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Bundle {self.path}: {self.target}, {self.nbytes:,} bytes>"

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    @property
    def nbytes(self) -> int:
        """Bytes of the artifact's files, which the budget of the plan limits."""
        return sum(self.manifest["files"][name]["nbytes"] for name in self.manifest["artifact"])

    def read_json(self, name: str) -> Any:
        return _read_json(self.path / name)

    def check_files(self) -> None:
        """Raise `GateError` for the first file that is missing or has changed."""
        for name, expected in self.manifest["files"].items():
            path = self.path / name
            if not path.is_file():
                raise GateError("a file of the bundle is missing", where=path)
            actual = describe_file(path)
            if actual != expected:
                raise GateError(
                    "a file of the bundle has changed since it was exported",
                    where=path,
                    expected=f"{expected['nbytes']} bytes, sha256 {expected['sha256'][:16]}...",
                    got=f"{actual['nbytes']} bytes, sha256 {actual['sha256'][:16]}...",
                    todo="export it again",
                )


def open_bundle(path: str | Path) -> Bundle:
    """Open a finished bundle; raises `InputError` if `path` is not one."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("there is no such bundle", where=folder, expected="a folder")
    if not (folder / MANIFEST).is_file():
        raise InputError(
            "the folder contains no finished bundle",
            where=folder,
            expected=MANIFEST,
            todo="lfmc export writes one",
        )
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise InputError("the manifest is not an object", where=folder / MANIFEST)
    required = ("target", "files", "artifact", "context")
    missing = [key for key in required if key not in manifest]
    if missing:
        raise InputError("the manifest lacks keys", where=folder / MANIFEST, expected=missing)
    return Bundle(folder, manifest)


@contextmanager
def atomic_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder to write into; rename it to `path` when the block succeeds.

    A block that fails, or is interrupted, leaves no files. Raises `InputError` if `path` exists,
    unless `force` is set. With `force`, the old bundle is replaced after the block, not before.
    """
    if path.exists() and not force:
        raise InputError(
            "the output exists already", where=path, todo="--force replaces it, --output renames it"
        )
    path = path.absolute()
    if path.exists() and not _is_bundle(path):
        raise InputError(
            "the output exists and is no lfmc bundle, so it is not replaced",
            where=path,
            todo="remove it yourself, or choose another --output",
        )
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError("the output can't be written", where=path, got=error) from error
    try:
        yield partial
        _replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; an existing bundle remains complete until it is replaced."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_bundle(path: Path) -> bool:
    """Return whether lfmc wrote the folder: its manifest has lfmc's version and a target."""
    try:
        manifest = _read_json(path / MANIFEST)
    except InputError:
        return False
    return isinstance(manifest, dict) and {"lfmc", "target"} <= set(manifest)


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"nbytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, which every parser reads; a NaN raises `ValueError`."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error
