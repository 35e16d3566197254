"""A hook of mkdocs: links from a page to files of the repository that are no pages.

On a forge they work as they are. In the site they lead to `repo_url` of mkdocs.yml, or, where none
is set, become the file's name. A file that does not exist is a warning, which `--strict` refuses.
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
    """Rewrite every link that leaves the docs folder; mkdocs calls this for each page."""
    docs = Path(config["docs_dir"])
    return _LINK.sub(
        lambda found: rewrite(found, page.file.src_uri, docs, config["repo_url"]), markdown
    )


def rewrite(found: re.Match[str], source: str, docs: Path, repo_url: str) -> str:
    """What stands for a link of the page `source` (its path inside of `docs`)."""
    text, target = found[1], found[2]
    path = normpath(PurePosixPath(docs.name) / PurePosixPath(source).parent / target)
    if path.startswith(f"{docs.name}/"):
        return found[0]
    if not (docs.parent / path).exists():
        _LOG.warning("%s links to '%s', which does not exist", source, target)
    if repo_url:
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{found[3] or ''})"
    return text if path in text.strip("`/") else f"{text} (`{path}`)"
