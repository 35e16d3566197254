"""One verified export of the bundled checkpoint, shared by the tests of export and commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfmc.bundle import Bundle
from lfmc.checkpoint import open_checkpoint
from lfmc.exporter import Options, Report, export
from lfmc.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Report]:
    """`--bits uniform` with the full check; its folder must not be changed."""
    output = tmp_path_factory.mktemp("export") / "bundle"
    options = Options(bits="uniform", context=200)
    checkpoint, target = open_checkpoint(), get_target("onnx")
    return export(checkpoint, target, output, options, force=False, progress=Silent())


@pytest.fixture
def bundle_path(exported: tuple[Bundle, Report]) -> Path:
    return exported[0].path
