"""Runs lfmc in separate processes: on a terminal, in a pipe, and with a shell's completion."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

LFMC = (sys.executable, "-m", "lfmc")


def run_on_terminal(
    *arguments: str | Path, columns: int = 100, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run lfmc with a terminal as stdin, stdout and stderr; return the exit code and the output."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [*LFMC, *map(str, arguments)],
        stdin=side,
        stdout=side,
        stderr=side,
        env={**_environment(), "TERM": "xterm-256color", **(env or {})},
    )
    os.close(side)
    output = b""
    while block := _read(main):
        output += block
    os.close(main)
    return process.wait(), output.decode()


def _environment() -> dict[str, str]:
    """Return the environment without a size, which rich prefers to that of the terminal."""
    return {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}


def _read(file: int) -> bytes:
    try:
        return os.read(file, 1 << 16)
    except OSError:  # Linux: the other side is closed
        return b""


def run_shell(line: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `lfmc` is the lfmc of this environment."""
    script = f'lfmc() {{ {LFMC[0]} -m lfmc "$@"; }}\n{line}'
    command = ["bash", "-uo", "pipefail", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
