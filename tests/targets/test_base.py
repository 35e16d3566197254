"""Error messages about the packages of a target."""

from __future__ import annotations

import pytest

from lfmc.errors import UnsupportedError
from lfmc.targets.base import install_advice, require


def test_the_install_advice_names_the_package_that_provides_the_target() -> None:
    assert install_advice("ethos-u") == "pip install 'lfmc[ethos-u]'"
    assert (
        install_advice("lfmc-toy")
        == "install 'lfmc-toy', as described by the package of the target"
    )
    with pytest.raises(UnsupportedError, match="needs the package 'no_such_package'") as error:
        require("no_such_package.part", "onnx")
    assert "pip install 'lfmc[onnx]'" in str(error.value)
