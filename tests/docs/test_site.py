"""The site builds without warnings, loads nothing from other hosts, and has no dead links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lfmc
from tests.docs.blocks import PAGES, REPO, name_of, site_module

_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
_QUOTED_FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
_EXTERNAL_RESOURCE = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?:)?//|<link[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)[^>]*href=[\"']?(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'lfmc[docs]'")
    folder = tmp_path_factory.mktemp("site")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in (REPO / "docs").rglob("*.md"):
        html = page.relative_to(REPO / "docs").with_suffix(".html")
        assert (site / html).is_file()


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not _EXTERNAL_RESOURCE.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_reference_has_flags_and_signatures(site: Path) -> None:
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "--bits-per-weight" in commands
    assert "--accelerator" in commands
    assert "Sentinel" not in commands
    code = re.sub(r"<[^>]+>", "", "".join(re.findall(r"<pre>.*?</pre>", commands, re.S)))
    assert "lfmc check --accept" in code  # the lines of examples are not joined
    assert "\b" not in commands
    python = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in set(lfmc.__all__) - {"__version__"}:
        assert f'id="lfmc.{name}"' in python
    assert "__init__" not in python
    extending = (site / "reference" / "extending.html").read_text(encoding="utf-8")
    for name in ("passes.base.Pass", "targets.base.Target.lower", "targets.base.Artifact.tensors"):
        assert f'id="lfmc.{name}"' in extending


def test_search_needs_no_server(site: Path) -> None:
    """A page that is opened from disk takes the index from a script, and starts no worker."""
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {")
    assert "perplexity" in index
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="javascripts/iframe-worker.js"' in page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_point_to_existing_files(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_hook_rewrites_links_to_files_outside_the_docs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    links = site_module("links")

    def rewrite(text: str, repo_url: str, source: str = "coreml.md") -> str:
        return links._LINK.sub(
            lambda match: links.rewrite(match, source, REPO / "docs", repo_url), text
        )

    link = "[examples/ios](../examples/ios/README.md)"
    assert rewrite("[an app](../examples/ios/README.md)", "") == "an app (`examples/ios/README.md`)"
    assert rewrite("[examples/ios](../examples/ios)", "") == "examples/ios"
    assert (
        rewrite(link, "https://host/o/n/")
        == "[examples/ios](https://host/o/n/blob/main/examples/ios/README.md)"
    )
    assert rewrite("[x](../parity.md#rung-4)", "", "tutorials/ci.md") == "[x](../parity.md#rung-4)"
    assert not caplog.records
    rewrite("[x](../no/such/file)", "")
    assert "does not exist" in caplog.text


def test_code_in_the_pages_equals_the_files() -> None:
    num_lines = {}
    for page in PAGES:
        for path, text in _QUOTED_FILE.findall(page.read_text(encoding="utf-8")):
            assert text == (REPO / path).read_text(encoding="utf-8"), f"{name_of(page)}: {path}"
            num_lines[path] = text.count("\n")
    assert num_lines["examples/toy_pass.py"] < 100
    assert num_lines["examples/toy_target/lfmc_toy.py"] < 100
