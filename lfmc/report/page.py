"""One self-contained HTML file from a template of this package; everything in it is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lfmc.report import units
from lfmc.version import __version__


def templates() -> Environment:
    """This package's templates and macros; everything in them is escaped."""
    return Environment(
        loader=PackageLoader("lfmc.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """The page of `templates/TEMPLATE`, with `values` in it; no page loads anything else."""
    environment = templates()
    compact = {"separators": (",", ":"), "allow_nan": False}
    environment.policies["json.dumps_kwargs"] = compact
    environment.filters |= {"size": units.size, "percent": units.percent}
    return environment.get_template(template).render(version=__version__, **values)
