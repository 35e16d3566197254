"""The site builds without a warning, loads nothing from elsewhere, and links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, REPO, name_of

_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
_SHOWN = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?:)?//|<link[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)[^>]*href=[\"']?(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'lfmc[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in (REPO / "docs").rglob("*.md"):
        built = page.relative_to(REPO / "docs").with_suffix(".html")
        assert (site / built).is_file()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not _LOADED.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_reference_has_flags_and_signatures(site: Path) -> None:
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "--bits-per-weight" in commands
    assert "--accelerator" in commands
    assert "Sentinel" not in commands
    python = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in (
        "lfmc.api.export",
        "lfmc.api.load",
        "lfmc.passes.base.Pass",
        "lfmc.targets.base.Target",
        "lfmc.targets.base.Target.lower",
        "lfmc.targets.base.Artifact.tensors",
    ):
        assert f'id="{name}"' in python


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_hook_rewrites_links_that_leave_the_pages(caplog: pytest.LogCaptureFixture) -> None:
    sys.path.insert(0, str(REPO / "docs" / "site"))
    try:
        import links
    finally:
        sys.path.pop(0)

    def rewritten(text: str, repo_url: str, source: str = "coreml.md") -> str:
        return links._LINK.sub(
            lambda found: links.rewrite(found, source, REPO / "docs", repo_url), text
        )

    named = "[examples/ios](../examples/ios/README.md)"
    assert (
        rewritten("[an app](../examples/ios/README.md)", "") == "an app (`examples/ios/README.md`)"
    )
    assert rewritten("[examples/ios](../examples/ios)", "") == "examples/ios"
    assert (
        rewritten(named, "https://host/o/n/")
        == "[examples/ios](https://host/o/n/blob/main/examples/ios/README.md)"
    )
    assert (
        rewritten("[x](../parity.md#rung-4)", "", "tutorials/ci.md") == "[x](../parity.md#rung-4)"
    )
    assert not caplog.records
    rewritten("[x](../no/such/file)", "")
    assert "does not exist" in caplog.text


def test_code_in_the_pages_is_that_of_the_files() -> None:
    shown = {}
    for page in PAGES:
        for path, text in _SHOWN.findall(page.read_text(encoding="utf-8")):
            assert text == (REPO / path).read_text(encoding="utf-8"), f"{name_of(page)}: {path}"
            shown[path] = text.count("\n")
    assert shown["examples/toy_pass.py"] < 100
    assert shown["examples/toy_target/lfmc_toy.py"] < 100
