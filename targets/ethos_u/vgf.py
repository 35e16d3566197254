"""Convert the TOSA graphs to VGF, for Vulkan's ML extensions (Arm's neural graphics).

Arm's converter writes the VGF files. lfmc verifies the TOSA graphs, and does not execute the VGF.
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
    """Return the path of Arm's converter and its version.

    Raises `UnsupportedError` if the converter is missing or does not run.
    """
    program = os.environ.get(VARIABLE) or _find_in_package() or shutil.which(TOOL)
    if not program:
        raise UnsupportedError(
            f"VGF needs Arm's {TOOL}",
            todo=f"pip install ai-ml-sdk-model-converter, or set {VARIABLE} to its path",
        )
    try:
        process = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UnsupportedError(f"{TOOL} does not run here", where=program, got=error) from error
    if process.returncode:
        error_line = (process.stderr.strip().splitlines() or [f"exit {process.returncode}"])[0]
        raise UnsupportedError(f"{TOOL} does not run here", where=program, got=error_line)
    return Path(program), _parse_version(process.stdout)


def convert(converter: Path, tosa: Path, vgf: Path) -> None:
    """Write the VGF of a TOSA file."""
    command = [str(converter), "--input", str(tosa), "--output", str(vgf)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode or not vgf.is_file():
        error_line = (process.stderr.strip().splitlines() or [f"exit {process.returncode}"])[-1]
        raise UnsupportedError(f"{TOOL} rejects the graph", where=tosa.name, got=error_line)


def _parse_version(output: str) -> str:
    """Return the version from the output of `--version`: JSON, or only the version."""
    try:
        return str(json.loads(output)["version"])
    except (ValueError, KeyError, TypeError):
        return output.strip()


def _find_in_package() -> str | None:
    """Return the path of the program in Arm's Python package, if that is installed."""
    spec = find_spec("model_converter")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "binaries" / "bin" / TOOL
        if path.is_file():
            return str(path)
    return None
