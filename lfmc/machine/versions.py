"""Versions of the packages that lfmc was tested with, and of those that are installed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

TESTED: Mapping[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "onnx": "1.23.2",
    "onnx-ir": "1.1.0",
    "onnxruntime": "1.31.1",
    "onnxruntime-genai": "0.18.0",
    "coremltools": "9.0",
    "executorch": "1.5.1",
    "apache-tvm": "0.27.0.post1",
    "torch-mlir": "20261001",
    "iree-base-compiler": "3.13.0",
    "iree-base-runtime": "3.13.0",
}


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tool_versions() -> dict[str, str]:
    """Return Python, the platform, and the installed packages of `TESTED`."""
    versions = {package: installed_version(package) for package in TESTED}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{package: number for package, number in versions.items() if number is not None},
    }
