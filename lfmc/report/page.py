"""Render a template of this package to one self-contained HTML file; all values are escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lfmc.report import units
from lfmc.version import __version__


def templates() -> Environment:
    """Return the environment of this package's templates and macros, with autoescape."""
    return Environment(
        loader=PackageLoader("lfmc.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Return the page of `templates/TEMPLATE` with `values`; a page loads no other files."""
    environment = templates()
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"size": units.size, "percent": units.percent}
    return environment.get_template(template).render(version=__version__, **values)
