"""Context managers that hide the output of libraries from the user."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# Each import of torchao makes torch warn about how torchao registers its enums.
LOGGERS = ("root", "torch.utils._pytree")


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hide warnings and Python's stderr (progress bars, too); `loggers` log errors only."""
    all_loggers = [logging.getLogger(name) for name in (*LOGGERS, *loggers)]
    levels = [logger.level for logger in all_loggers]
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in all_loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(all_loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def silence_stdout() -> Iterator[None]:
    """Discard what C libraries print to stdout, because lfmc prints its results there."""
    sys.stdout.flush()
    stdout, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(devnull)
