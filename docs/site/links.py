"""A mkdocs hook that rewrites links from a page to files of the repository outside the docs.

On a code host, these links work unchanged. On the site, they point to `repo_url` of mkdocs.yml; if
it is not set, the hook replaces the link by the name of the file. A link to a missing file is a
warning, and so an error with `--strict`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_LOG = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite every link to a file outside the docs folder; mkdocs calls this for each page."""
    docs = Path(config["docs_dir"])
    return _LINK.sub(
        lambda match: rewrite(match, page.file.src_uri, docs, config["repo_url"]), markdown
    )


def rewrite(match: re.Match[str], source: str, docs: Path, repo_url: str) -> str:
    """Return the replacement of a link on the page `source`, a path relative to `docs`."""
    text, target = match[1], match[2]
    path = normpath(PurePosixPath(docs.name) / PurePosixPath(source).parent / target)
    if path.startswith(f"{docs.name}/"):
        return match[0]
    if not (docs.parent / path).exists():
        _LOG.warning("%s links to '%s', which does not exist", source, target)
    if repo_url:
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{match[3] or ''})"
    return text if path in text.strip("`/") else f"{text} (`{path}`)"
