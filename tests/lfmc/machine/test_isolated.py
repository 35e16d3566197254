"""Separate environments: the packages that pip installs, and the command that runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lfmc.errors import UnsupportedError
from lfmc.machine import isolated


def test_pip_installs_the_same_lfmc() -> None:
    url = {"url": "file:///source/lfmc", "dir_info": {"editable": True}}
    wheel = {"url": "file:///wheels/lfmc-0.1.0-py3-none-any.whl", "archive_info": {}}
    requirement = isolated.pip_requirement
    assert requirement("ethos-u", "0.1.0", None) == ["lfmc[ethos-u,reference]==0.1.0"]
    assert requirement("ethos-u", "0.1.0", json.dumps(url)) == [
        "-e",
        "/source/lfmc[ethos-u,reference]",
    ]
    assert requirement("ethos-u", "0.1.0", json.dumps(wheel)) == [
        "/wheels/lfmc-0.1.0-py3-none-any.whl[ethos-u,reference]"
    ]


class Recorder:
    """Replaces `subprocess.run`: records the commands and returns the given exit statuses."""

    def __init__(self, *statuses: int) -> None:
        self.commands: list[list[str]] = []
        self._statuses = iter(statuses)

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        return subprocess.CompletedProcess(
            command, next(self._statuses), "torch==2.13.0\nlfmc==1\n"
        )


def test_the_environment_is_created_once_and_runs_the_command_without_the_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path))
    folders: list[Path] = []

    def create(folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True)
        folders.append(folder)

    monkeypatch.setattr(isolated.venv, "create", create)
    run = Recorder(0, 0, 3, 0)
    monkeypatch.setattr(isolated.subprocess, "run", run)
    arguments = ["export", "./model", "--target", "ethos-u", "--isolated", "--force"]
    assert isolated.run_isolated("ethos-u", arguments) == 3
    assert isolated.run_isolated("ethos-u", arguments) == 0
    assert len(folders) == 1
    install, freeze, *runs = run.commands
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-1].endswith("[ethos-u,reference]")
    assert freeze[1:] == ["-m", "pip", "freeze"]
    python = isolated.ensure_environment("ethos-u")
    assert isolated.installed_packages(python) == ["torch==2.13.0", "lfmc==1"]
    command = ["export", "./model", "--target", "ethos-u", "--force"]
    assert [arguments[1:] for arguments in runs] == [["-m", "lfmc", *command]] * 2


def test_a_failed_installation_is_an_error_and_leaves_no_finished_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path))
    monkeypatch.setattr(
        isolated.venv, "create", lambda folder, **options: folder.mkdir(parents=True)
    )
    run = Recorder(1)
    monkeypatch.setattr(isolated.subprocess, "run", run)
    with pytest.raises(UnsupportedError, match="can't be created"):
        isolated.ensure_environment("ethos-u")
    assert not list(tmp_path.rglob(isolated.FREEZE_FILE))
