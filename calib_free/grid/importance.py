"""Importance of input channels as text: one letter for each channel, half an octave for each step.

A plan must produce the same codes every time. Each plan row therefore stores the column weights of
the clip search, coarsely enough to be readable: `a` is the most important channel of the matrix,
each next letter counts 1/sqrt(2) as much, and `z` stands for 2^-12.5 and everything below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def encode_importance(importance: Tensor) -> str:
    """Return one letter for each importance `[K]`, not negative; all `a` if all are zero."""
    largest = float(importance.max()) if importance.numel() else 0.0
    if largest <= 0:
        return "a" * importance.numel()
    shares = (importance.double() / largest).clamp(min=2.0**-13)
    steps = (-2 * shares.log2()).round().clamp(0, len(LETTERS) - 1)
    return "".join(LETTERS[int(step)] for step in steps)


def decode_importance(letters: str, where: str) -> Tensor:
    """Return importances float32 `[K]` from the letters of `encode_importance`.

    Raises `InputError`, located at `where`, for any other letter.
    """
    if not set(letters) <= set(LETTERS):
        raise InputError(
            "an importance can't be read", where=where, expected="letters a to z", got=letters[:40]
        )
    return torch.tensor([2.0 ** (-LETTERS.index(letter) / 2) for letter in letters])
