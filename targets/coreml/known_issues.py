"""Reported failures on devices, which an export prints with a link to the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.targets.coreml.states import PackageState

ISSUES = "https://github.com/apple/coremltools/issues"


@dataclass(frozen=True)
class Package:
    """The properties of a package that decide which failures apply."""

    version: str
    formats: frozenset[Format | Floats]
    states: tuple[PackageState, ...]

    @property
    def has_four_bits(self) -> bool:
        return any(isinstance(f, Format) and f.bits == 4 for f in self.formats)

    @property
    def has_odd_states(self) -> bool:
        return any(state.shape[-1] % 32 for state in self.states)


@dataclass(frozen=True)
class Trouble:
    """A failure on a device, and the link to its report."""

    what: str
    link: str
    applies: Callable[[Package], bool]


TROUBLES = (
    Trouble(
        "4-bit weights in a stateful package of coremltools 9.0 were reported to crash on the "
        "Neural Engine after some hundred calls; use CPU and GPU",
        f"{ISSUES}/2716",
        lambda package: package.version.startswith("9.0") and package.has_four_bits,
    ),
    Trouble(
        "states whose last dim is no multiple of 32 were reported to fail on the Neural "
        "Engine; use CPU and GPU",
        f"{ISSUES}/2631",
        lambda package: package.has_odd_states,
    ),
)


def known_troubles(
    version: str, formats: Iterable[Format | Floats], states: Iterable[PackageState]
) -> list[dict[str, str]]:
    """Return the known failures of a package as `what` and `link`; `version` is coremltools'."""
    package = Package(version, frozenset(formats), tuple(states))
    return [{"what": t.what, "link": t.link} for t in TROUBLES if t.applies(package)]
