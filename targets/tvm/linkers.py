"""Find a compiler that links a library for a machine."""

from __future__ import annotations

import platform
import shutil


def linkers(machine: str) -> tuple[str, ...]:
    """Return the programs that link for `machine` (`x86_64`, `aarch64`), by Debian's names."""
    cross_compiler = f"{machine}-linux-gnu-g++"
    return (
        ("g++", "clang++", cross_compiler) if machine == platform.machine() else (cross_compiler,)
    )


def find_linker(machine: str) -> str | None:
    """Return a linker for `machine` that is installed here, or None."""
    return next(filter(shutil.which, linkers(machine)), None)
