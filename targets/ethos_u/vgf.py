"""VGF beside the TOSA: the same graphs for Vulkan's ML extensions, Arm's neural graphics.

Arm's converter writes it. Nothing here executes it: the TOSA that it is made of is what is proven.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from lfmc.errors import UnsupportedError

TOOL, VARIABLE = "model-converter", "MODEL_CONVERTER_PATH"  # ExecuTorch reads the same variable
SUFFIX, VGF = ".tosa", ".vgf"


def require_converter() -> tuple[Path, str]:
    """Arm's converter, and its version; `UnsupportedError` where it is not here or does not run."""
    found = os.environ.get(VARIABLE) or _packaged() or shutil.which(TOOL)
    if not found:
        raise UnsupportedError(
            f"VGF needs Arm's {TOOL}",
            todo=f"pip install ai-ml-sdk-model-converter, or name the program by {VARIABLE}",
        )
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnsupportedError(f"{TOOL} does not run here", where=found, got=error) from error
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[0]
        raise UnsupportedError(f"{TOOL} does not run here", where=found, got=told)
    return Path(found), _version(done.stdout)


def convert(converter: Path, tosa: Path, vgf: Path) -> None:
    """Write the VGF of a TOSA file."""
    command = [str(converter), "--input", str(tosa), "--output", str(vgf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not vgf.is_file():
        told = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise UnsupportedError(f"{TOOL} does not take the graph", where=tosa.name, got=told)


def _version(told: str) -> str:
    """Of what the converter says of itself, which is JSON of its parts, too."""
    try:
        return str(json.loads(told)["version"])
    except (ValueError, KeyError, TypeError):
        return told.strip()


def _packaged() -> str | None:
    """The program inside of Arm's Python package, where that is installed."""
    spec = find_spec("model_converter")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "binaries" / "bin" / TOOL
        if path.is_file():
            return str(path)
    return None
