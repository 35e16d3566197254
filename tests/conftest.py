"""Fixtures that every test may use: tiny checkpoints, trained ones, and golden texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint, demo_path, open_checkpoint
from tests.factories import KINDS, save_tiny_checkpoint

TRAINED = ("lfm2-moe-8m", "lfm2-moe-38m", "lfm2-17m", "lfm3-17m")
_SHARED = Path(__file__).parents[2] / "shared" / "models"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden texts anew")
    parser.addoption("--slow", action="store_true", help="also run tests of more than 20 seconds")
    parser.addoption("--arm", action="store_true", help="also run what is built for 64-bit Arm")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")
    config.addinivalue_line("markers", "arm: builds for 64-bit Arm and runs that under qemu")
    torch.set_num_threads(1)  # every model here is too small to share


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in ("slow", "arm"):
        if config.getoption(f"--{name}"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"needs --{name}"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is kept apart from what the user's own plans measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFMC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(kind, **overrides)`: the folder of a random checkpoint, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, **overrides: Any) -> Path:
        key = (kind, *map(repr, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[key] = save_tiny_checkpoint(folder, kind, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def any_checkpoint(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Checkpoint]:
    """`any_checkpoint(name)`: of a kind in `KINDS`, or a trained one (skipped where absent)."""

    def find(name: str) -> Checkpoint:
        if name in KINDS:
            return open_checkpoint(tiny_checkpoint(name))
        path = demo_path() if name == demo_path().name else _SHARED / name
        if not path.is_dir():
            pytest.skip(f"the trained checkpoint {path} is not on this machine")
        return open_checkpoint(path)

    return find


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares with `golden/NAME.txt` beside the test."""

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text + "\n", encoding="utf-8")
        assert path.is_file(), f"no {path}: run pytest with --update-golden and read what it wrote"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return compare
