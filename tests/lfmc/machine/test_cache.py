"""The cache: entries, damaged entries, and keys."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lfmc.machine.cache import (
    NO_CACHE,
    UNFINISHED,
    UNFINISHED_SECONDS,
    Cache,
    cache_key,
    default_cache,
    tensor_digest,
)

KEY = cache_key("rule-1", "what", 3)


def entry_of(cache: Cache) -> Path:
    assert cache.folder is not None
    (entry,) = cache.folder.glob("*/*")
    return entry


def test_floats_come_back_to_the_bit(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    value = {"a": [0.1, 1e-300, 2 / 3], "b": None, "c": "text"}
    assert cache.get(KEY) is None
    cache.put(KEY, value)
    assert cache.get(KEY) == value
    assert cache.get(cache_key("rule-2", "what", 3)) is None
    assert entry_of(cache).suffix == ".json"  # and no partial file beside it


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"digest": 1, "value": 2}', "\xff"])
def test_a_damaged_entry_is_absent_and_can_be_written_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, 1.5)
    entry_of(cache).write_text(damage, encoding="latin-1")
    assert cache.get(KEY) is None
    cache.put(KEY, 1.5)
    assert cache.get(KEY) == 1.5


def test_an_entry_of_another_key_or_value_is_absent(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, 1.5)
    entry = entry_of(cache)
    other_key = cache_key("rule-1", "else")
    (tmp_path / other_key[:2]).mkdir(exist_ok=True)
    (tmp_path / other_key[:2] / f"{other_key}.json").write_bytes(entry.read_bytes())
    assert cache.get(other_key) is None
    changed = json.loads(entry.read_text())
    entry.write_text(json.dumps({**changed, "value": "2.5"}))
    assert cache.get(KEY) is None


def test_a_folder_that_can_t_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "below")
    cache.put(KEY, 1)
    assert cache.get(KEY) is None


def test_a_disabled_cache_stores_nothing() -> None:
    NO_CACHE.put(KEY, 1)
    assert NO_CACHE.get(KEY) is None


def test_the_cache_folder_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path))
    assert default_cache() == Cache(tmp_path)
    monkeypatch.delenv("LFMC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == Cache(tmp_path / "lfmc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Cache(Path.home() / ".cache" / "lfmc")


def test_a_digest_depends_on_values_dtypes_and_shapes() -> None:
    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.tensor([0.0, 0.0, 0.0, -0.0]),
    ]
    assert len({tensor_digest(t) for t in tensors}) == len(tensors)
    matrix = torch.arange(6.0).view(2, 3)
    assert tensor_digest(matrix.T) == tensor_digest(matrix.T.contiguous())


def test_intermediate_tensors_survive_until_they_are_deleted(tmp_path: Path) -> None:
    cache, tensors = Cache(tmp_path), {"a": torch.randn(3, 4).T, "b": torch.arange(3)}
    cache.intermediate(KEY).save("layer", tensors)
    loaded = cache.intermediate(KEY).load("layer")
    assert loaded is not None
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert cache.intermediate(KEY).load("other") is None
    cache.intermediate(KEY).delete()
    assert cache.intermediate(KEY).load("layer") is None
    NO_CACHE.intermediate(KEY).save("layer", tensors)
    assert NO_CACHE.intermediate(KEY).load("layer") is None


def test_damaged_intermediate_tensors_count_as_absent(tmp_path: Path) -> None:
    stored = Cache(tmp_path).intermediate(KEY)
    stored.save("layer", {"a": torch.ones(100)})
    (file,) = (tmp_path / UNFINISHED / KEY).iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert stored.load("layer") is None


def test_old_unfinished_computations_are_deleted(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path), cache_key("rule-1", "other")
    for key in (KEY, other):
        cache.intermediate(key).save("layer", {"a": torch.ones(1)})
    for folder in (tmp_path / UNFINISHED).iterdir():
        old = folder.stat().st_mtime - UNFINISHED_SECONDS - 60
        os.utime(folder, (old, old))
    cache.intermediate(KEY)
    assert [folder.name for folder in (tmp_path / UNFINISHED).iterdir()] == [KEY]
