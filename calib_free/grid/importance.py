"""Importance of input channels as text: one letter a channel, half an octave a letter.

A plan must give the same codes every time, so what a clip search weighs columns with is written
into the row, coarse enough to be read: `a` is the most important channel of the matrix, each
next letter counts 1/sqrt(2) as much, `z` stands for 2^-12.5 and everything below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def encode(importance: Tensor) -> str:
    """Letters for importances `[K]`, not negative; all `a` where all are zero."""
    largest = float(importance.max()) if importance.numel() else 0.0
    if largest <= 0:
        return "a" * importance.numel()
    shares = (importance.double() / largest).clamp(min=2.0**-13)
    steps = (-2 * shares.log2()).round().clamp(0, len(LETTERS) - 1)
    return "".join(LETTERS[int(step)] for step in steps)


def decode(letters: str, where: str) -> Tensor:
    """Importances float32 `[K]` of `encode`'s letters; `InputError` names `where` for others."""
    if not set(letters) <= set(LETTERS):
        raise InputError(
            "an importance can't be read", where=where, expected="letters a to z", got=letters[:40]
        )
    return torch.tensor([2.0 ** (-LETTERS.index(letter) / 2) for letter in letters])
