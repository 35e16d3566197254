"""Fixtures of all tests: tiny checkpoints, trained checkpoints and golden texts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint, demo_path, open_checkpoint
from tests.factories import KINDS, save_tiny_checkpoint
from tests.run_cache import RunCache

TRAINED = ("lfm2-moe-8m", "lfm2-moe-38m", "lfm2-17m", "lfm3-17m")
_SHARED = Path(__file__).parents[2] / "shared" / "models"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts again")
    parser.addoption("--slow", action="store_true", help="also run tests of more than 20 seconds")
    parser.addoption("--arm", action="store_true", help="also run tests of builds for 64-bit Arm")
    parser.addoption("--web", action="store_true", help="also run tests in Node and in Chromium")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")
    config.addinivalue_line("markers", "arm: builds for 64-bit Arm and runs under qemu")
    config.addinivalue_line("markers", "web: runs transformers.js in Node and in Chromium")
    torch.set_num_threads(1)  # every model here is too small for several threads


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in ("slow", "arm", "web"):
        if config.getoption(f"--{name}"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                reason = f"needs --{name}: make test-{name} runs it"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count skipped tests by reason."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5} {reason}")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this test run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def run_cache(run_folder: Path) -> RunCache:
    """Return the cache of exports and artifacts of this test run."""
    return RunCache(run_folder / "run-cache")


@pytest.fixture(scope="session", autouse=True)
def _measurement_cache(run_folder: Path) -> Iterator[None]:
    """Use a measurement cache of this test run instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFMC_CACHE", str(run_folder / "measurements"))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `tiny_checkpoint(kind, **overrides)`: the folder of a random checkpoint, cached."""
    folders: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, **overrides: Any) -> Path:
        key = (kind, *map(repr, sorted(overrides.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp(kind)
            folders[key] = save_tiny_checkpoint(folder, kind, **overrides)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def any_checkpoint(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Checkpoint]:
    """Return `any_checkpoint(name)`: a tiny one of `KINDS`, or a trained one (skip if absent)."""

    def find(name: str) -> Checkpoint:
        if name in KINDS:
            return open_checkpoint(tiny_checkpoint(name))
        path = demo_path() if name == demo_path().name else _SHARED / name
        if not path.is_dir():
            pytest.skip(f"no trained checkpoint {path.name}: users do not have it")
        return open_checkpoint(path)

    return find


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return `golden(name, text)`, which compares with `golden/NAME.txt` next to the test."""

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text + "\n", encoding="utf-8")
        assert path.is_file(), f"no {path}: run pytest with --update-golden and read what it wrote"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return compare
