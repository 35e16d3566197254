"""Runs a command in a separate virtual environment, for a target with conflicting packages."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import distributions, requires, version
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from lfmc.errors import UnsupportedError
from lfmc.machine.cache import cache_folder

FLAG = "--isolated"
FREEZE_FILE = ".installed"  # the output of `pip freeze`; marks a finished environment
REFERENCE = "reference"  # the extra that rung 1 of parity requires


def run_isolated(extra: str, arguments: Sequence[str]) -> int:
    """Run `lfmc` with the arguments, without `--isolated`, in the environment of an extra.

    Return the exit status. The environment is in the cache folder. It is created once for each
    extra, version of lfmc and set of lfmc's requirements.
    """
    python = ensure_environment(extra)
    command = [argument for argument in arguments if argument != FLAG]
    return subprocess.run([str(python), "-m", "lfmc", *command], check=False).returncode


def ensure_environment(extra: str) -> Path:
    """Return the Python of an environment with lfmc, its `extra` and `reference`; create it once.

    Raise `UnsupportedError` if pip fails.
    """
    digest = hashlib.sha256("\n".join(requires("lfmc") or ()).encode()).hexdigest()[:8]
    folder = cache_folder() / "environments" / f"{extra}-{version('lfmc')}-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / FREEZE_FILE).is_file():
        return python
    urls = (package.read_text("direct_url.json") for package in distributions(name="lfmc"))
    requirement = pip_requirement(extra, version("lfmc"), next(filter(None, urls), None))
    print(f"creating an environment for {requirement} in {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    constraints = ["torch==" + version("torch").partition("+")[0]]
    command = [str(python), "-m", "pip", "install", "-q", *constraints, *requirement]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise UnsupportedError(
            "the environment can't be created",
            where=folder,
            got=f"pip install {' '.join(requirement)}",
        )
    freeze = [str(python), "-m", "pip", "freeze"]
    packages = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    (folder / FREEZE_FILE).write_text(packages, encoding="utf-8")
    return python


def installed_packages(python: Path) -> list[str]:
    """Return packages and versions, `name==version`, of an environment of `ensure_environment`."""
    return (python.parents[1] / FREEZE_FILE).read_text(encoding="utf-8").splitlines()


def pip_requirement(extra: str, version: str, direct_url: str | None) -> list[str]:
    """Return pip's arguments that install this same lfmc: from its source URL, or by version.

    `direct_url` is the text of the package's `direct_url.json` (PEP 610), if it has one.
    """
    extras = f"{extra},{REFERENCE}"
    if direct_url is None:
        return [f"lfmc[{extras}]=={version}"]
    origin = json.loads(direct_url)
    source = url2pathname(urlparse(origin["url"]).path)
    editable = origin.get("dir_info", {}).get("editable", False)
    return [*(["-e"] if editable else []), f"{source}[{extras}]"]
