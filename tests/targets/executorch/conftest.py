"""One export, shared by all tests that need a bundle."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lfmc.bundle.bundle import Bundle


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle of at most 11 bits per weight, for 128 tokens in calls of at most 32."""
    return tiny_bundle("executorch", 11.0, chunk="32")
