"""Versions of the tools that made, or would make, a bundle, next to those that were tested."""

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
}


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tool_versions() -> dict[str, str]:
    """Python, the platform, and every known package that is installed."""
    found = {package: installed(package) for package in TESTED}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{package: number for package, number in found.items() if number is not None},
    }
