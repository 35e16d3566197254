"""Known failures that an export reports."""

from __future__ import annotations

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.targets.coreml.known_issues import known_troubles
from lfmc.targets.coreml.states import PackageState

FOUR, EIGHT = (Format(bits, 32, True, "float16") for bits in (4, 8))
EVEN = PackageState("conv_state_0", (1, 2, 64), True)
ODD = PackageState("key_cache_0", (1, 2, 96, 40), True)


def numbers(version: str, formats: list[Format | Floats], states: list[PackageState]) -> list[str]:
    return [issue["link"].rpartition("/")[2] for issue in known_troubles(version, formats, states)]


def test_each_issue_applies_only_to_the_reported_packages() -> None:
    assert numbers("9.0", [FOUR, Floats("float32")], [EVEN]) == ["2716"]
    assert numbers("9.1", [FOUR], [EVEN]) == []
    assert numbers("9.0", [EIGHT, Floats("float32")], [EVEN, ODD]) == ["2631"]
    assert numbers("9.0", [FOUR], [ODD]) == ["2716", "2631"]
