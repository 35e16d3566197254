"""Keeping what libraries say of themselves away from the user."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# torch warns of how torchao registers its enums, at every import of it.
LOGGERS = ("root", "torch.utils._pytree")


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """No warnings, no progress bars, no stderr of Python's, and of these loggers errors only."""
    found = [logging.getLogger(name) for name in (*LOGGERS, *loggers)]
    levels = [logger.level for logger in found]
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in found:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(found, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """Nothing on standard output, where results go, of C libraries, which print there unasked."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
