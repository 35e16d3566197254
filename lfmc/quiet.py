"""Keeping what libraries say of themselves away from the user."""

from __future__ import annotations

import contextlib
import io
import logging
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
