"""Environments of their own: what is installed in them, and what is run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lfmc.errors import UnsupportedError
from lfmc.machine import isolated


def test_this_very_lfmc_is_installed() -> None:
    url = {"url": "file:///source/lfmc", "dir_info": {"editable": True}}
    wheel = {"url": "file:///wheels/lfmc-0.1.0-py3-none-any.whl", "archive_info": {}}
    of = isolated.requirement
    assert of("ethos-u", "0.1.0", None) == ["lfmc[ethos-u,reference]==0.1.0"]
    assert of("ethos-u", "0.1.0", json.dumps(url)) == ["-e", "/source/lfmc[ethos-u,reference]"]
    assert of("ethos-u", "0.1.0", json.dumps(wheel)) == [
        "/wheels/lfmc-0.1.0-py3-none-any.whl[ethos-u,reference]"
    ]


FROZEN = "torch==2.13.0\nlfmc==1\n"


class Recorder:
    """Stands for `subprocess.run`: keeps commands, and ends as it is told."""

    def __init__(self, *statuses: int) -> None:
        self.commands: list[list[str]] = []
        self._statuses = iter(statuses)

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        return subprocess.CompletedProcess(
            command, next(self._statuses), "torch==2.13.0\nlfmc==1\n"
        )


def test_it_is_made_once_and_runs_the_rest_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path))
    made: list[Path] = []

    def create(folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True)
        made.append(folder)

    monkeypatch.setattr(isolated.venv, "create", create)
    run = Recorder(0, 0, 3, 0)
    monkeypatch.setattr(isolated.subprocess, "run", run)
    arguments = ["export", "./model", "--target", "ethos-u", "--isolated", "--force"]
    assert isolated.run_isolated("ethos-u", arguments) == 3
    assert isolated.run_isolated("ethos-u", arguments) == 0
    assert len(made) == 1
    install, freeze, *runs = run.commands
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-1].endswith("[ethos-u,reference]")
    assert freeze[1:] == ["-m", "pip", "freeze"]
    python = isolated.environment("ethos-u")
    assert isolated.installed_in(python) == ["torch==2.13.0", "lfmc==1"]
    rest = ["export", "./model", "--target", "ethos-u", "--force"]
    assert [own[1:] for own in runs] == [["-m", "lfmc", *rest]] * 2


def test_what_can_not_be_installed_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path))
    monkeypatch.setattr(
        isolated.venv, "create", lambda folder, **options: folder.mkdir(parents=True)
    )
    run = Recorder(1)
    monkeypatch.setattr(isolated.subprocess, "run", run)
    with pytest.raises(UnsupportedError, match="can't be made"):
        isolated.environment("ethos-u")
    assert not list(tmp_path.rglob(isolated.READY))
