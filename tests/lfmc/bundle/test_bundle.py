"""Bundles are whole or absent, and a changed one is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfmc.bundle.bundle import MANIFEST, describe, open_bundle, write_json, writing
from lfmc.errors import GateError, InputError


def finish(folder: Path, text: str = "model") -> None:
    (folder / "model.bin").write_text(text)
    files = {"model.bin": describe(folder / "model.bin")}
    facts = {"lfmc": "0", "target": "x", "context": 8}
    manifest = {**facts, "files": files, "artifact": ["model.bin"]}
    write_json(folder / MANIFEST, manifest)


def test_a_finished_bundle_opens(tmp_path: Path) -> None:
    with writing(tmp_path / "b", force=False) as folder:
        finish(folder)
    bundle = open_bundle(tmp_path / "b")
    bundle.check_files()
    assert bundle.nbytes == 5
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError("x")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with writing(tmp_path / "b", force=False) as folder:
            (folder / "half").write_text("...")
            raise error

    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_kept_without_force(tmp_path: Path) -> None:
    with writing(tmp_path / "b", force=False) as folder:
        finish(folder)
    with (
        pytest.raises(InputError, match="exists already") as caught,
        writing(tmp_path / "b", force=False),
    ):
        pytest.fail("not reached")
    assert "--force" in str(caught.value)


def test_force_replaces_at_the_end_only(tmp_path: Path) -> None:
    with writing(tmp_path / "b", force=False) as folder:
        finish(folder, "old")
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "b", force=True):
        raise KeyboardInterrupt
    assert (tmp_path / "b" / "model.bin").read_text() == "old"
    with writing(tmp_path / "b", force=True) as folder:
        finish(folder, "new")
    assert (tmp_path / "b" / "model.bin").read_text() == "new"


def test_force_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "photos" / MANIFEST).write_text('{"name": "a web app"}')
    with (
        pytest.raises(InputError, match="no lfmc bundle"),
        writing(tmp_path / "photos", force=True),
    ):
        pytest.fail("not reached")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "model.bin").write_text("modem")
    with pytest.raises(GateError, match="has changed") as caught:
        open_bundle(tmp_path).check_files()
    assert "model.bin" in str(caught.value)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(GateError, match="is missing"):
        open_bundle(tmp_path).check_files()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [(None, "no finished bundle"), ("{", "can't be read"), (json.dumps({}), "lacks keys")],
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, manifest: str | None, message: str) -> None:
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=message):
        open_bundle(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such bundle"):
        open_bundle(tmp_path / "nowhere")
