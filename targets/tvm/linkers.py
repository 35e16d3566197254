"""Finding a compiler that links a library for a machine."""

from __future__ import annotations

import platform
import shutil


def linkers(machine: str) -> tuple[str, ...]:
    """Programs that link for `machine` (`x86_64`, `aarch64`), as Debian calls them."""
    own = f"{machine}-linux-gnu-g++"
    return ("g++", "clang++", own) if machine == platform.machine() else (own,)


def linker_of(machine: str) -> str | None:
    """One that is on this machine."""
    return next(filter(shutil.which, linkers(machine)), None)
