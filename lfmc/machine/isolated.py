"""Running a command in an environment of its own, for a target whose packages clash with others."""

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

FLAG, READY = "--isolated", ".installed"
REFERENCE = "reference"  # the extra that rung 1 of parity needs


def run_isolated(extra: str, arguments: Sequence[str]) -> int:
    """Run `lfmc` with the arguments, but for `--isolated`, where it has that extra; its exit
    status. The environment lies in the cache's folder, and is made once for what lfmc requires."""
    python = environment(extra)
    rest = [own for own in arguments if own != FLAG]
    return subprocess.run([str(python), "-m", "lfmc", *rest], check=False).returncode


def environment(extra: str) -> Path:
    """The Python of an environment that has lfmc, an extra of it, and what rung 1 needs."""
    required = hashlib.sha256("\n".join(requires("lfmc") or ()).encode()).hexdigest()[:8]
    folder = cache_folder() / "environments" / f"{extra}-{version('lfmc')}-{required}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / READY).is_file():
        return python
    told = (own.read_text("direct_url.json") for own in distributions(name="lfmc"))
    wanted = requirement(extra, version("lfmc"), next(filter(None, told), None))
    print(f"making an environment for {wanted} in {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    constrained = ["torch==" + version("torch").partition("+")[0]]
    command = [str(python), "-m", "pip", "install", "-q", *constrained, *wanted]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise UnsupportedError(
            "the environment can't be made", where=folder, got=f"pip install {' '.join(wanted)}"
        )
    freeze = [str(python), "-m", "pip", "freeze"]
    found = subprocess.run(freeze, check=True, capture_output=True, text=True)
    (folder / READY).write_text(found.stdout, encoding="utf-8")
    return python


def installed_in(python: Path) -> list[str]:
    """The packages, with their versions, of an environment that `environment` made."""
    return (python.parents[1] / READY).read_text(encoding="utf-8").splitlines()


def requirement(extra: str, version: str, direct_url: str | None) -> list[str]:
    """What pip installs this very lfmc by: its source where it came from one, else its version."""
    extras = f"{extra},{REFERENCE}"
    if direct_url is None:
        return [f"lfmc[{extras}]=={version}"]
    told = json.loads(direct_url)
    source = url2pathname(urlparse(told["url"]).path)
    editable = told.get("dir_info", {}).get("editable", False)
    return [*(["-e"] if editable else []), f"{source}[{extras}]"]
