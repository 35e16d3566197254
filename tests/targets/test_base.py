"""What is said of a target's packages."""

from __future__ import annotations

import pytest

from lfmc.errors import UnsupportedError
from lfmc.targets.base import install_advice, require


def test_the_remedy_is_that_of_whoever_brings_the_target() -> None:
    assert install_advice("ethos-u") == "pip install 'lfmc[ethos-u]'"
    assert install_advice("lfmc-toy") == "install 'lfmc-toy', as the target's own package says"
    with pytest.raises(UnsupportedError, match="needs the package 'no_such_package'") as told:
        require("no_such_package.part", "onnx")
    assert "pip install 'lfmc[onnx]'" in str(told.value)
