"""Bundles are written completely or not at all, and changed files are detected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfmc.bundle.bundle import MANIFEST, atomic_folder, describe_file, open_bundle, write_json
from lfmc.errors import GateError, InputError


def write_bundle(folder: Path, text: str = "model") -> None:
    (folder / "model.bin").write_text(text)
    files = {"model.bin": describe_file(folder / "model.bin")}
    facts = {"lfmc": "0", "target": "x", "context": 8}
    manifest = {**facts, "files": files, "artifact": ["model.bin"]}
    write_json(folder / MANIFEST, manifest)


def test_a_finished_bundle_opens(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "b", force=False) as folder:
        write_bundle(folder)
    bundle = open_bundle(tmp_path / "b")
    bundle.check_files()
    assert bundle.nbytes == 5
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError("x")])
def test_a_failure_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "b", force=False) as folder:
            (folder / "half").write_text("...")
            raise error

    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_not_replaced_without_force(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "b", force=False) as folder:
        write_bundle(folder)
    with (
        pytest.raises(InputError, match="exists already") as excinfo,
        atomic_folder(tmp_path / "b", force=False),
    ):
        pytest.fail("not reached")
    assert "--force" in str(excinfo.value)


def test_force_replaces_at_the_end_only(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "b", force=False) as folder:
        write_bundle(folder, "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "b", force=True):
        raise KeyboardInterrupt
    assert (tmp_path / "b" / "model.bin").read_text() == "old"
    with atomic_folder(tmp_path / "b", force=True) as folder:
        write_bundle(folder, "new")
    assert (tmp_path / "b" / "model.bin").read_text() == "new"


def test_force_never_replaces_other_folders(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "photos" / MANIFEST).write_text('{"name": "a web app"}')
    with (
        pytest.raises(InputError, match="no lfmc bundle"),
        atomic_folder(tmp_path / "photos", force=True),
    ):
        pytest.fail("not reached")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_changed_file_is_an_error(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    (tmp_path / "model.bin").write_text("modem")
    with pytest.raises(GateError, match="has changed") as excinfo:
        open_bundle(tmp_path).check_files()
    assert "model.bin" in str(excinfo.value)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(GateError, match="is missing"):
        open_bundle(tmp_path).check_files()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [(None, "no finished bundle"), ("{", "can't be read"), (json.dumps({}), "lacks keys")],
)
def test_other_folders_are_refused(tmp_path: Path, manifest: str | None, message: str) -> None:
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=message):
        open_bundle(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such bundle"):
        open_bundle(tmp_path / "nowhere")
