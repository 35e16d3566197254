"""README.md and docs/demo.md show what `make demo` prints today."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lfmc.check.config import load_matrix
from lfmc.commands.export import command as export_command
from tests.docs.blocks import REPO, site_module
from tests.run_cache import RunCache

demo = site_module("demo")
# What `make check` allows another CPU, too; top-1 is a share there, and per cent on the page.
DRIFT = load_matrix(REPO / ".lfmc.toml", export_command).drift
# Name: the number, and how far the page's may be from it.
NUMBERS = {
    "tokens": (r"parity 4, on (\d+) tokens", {"abs": 0}),
    "KL": (r"KL (\d+\.\d+) nats per token", {"rel": DRIFT.kl}),
    "top-1": (r"top-1 (\d+\.\d+) %", {"abs": 100 * DRIFT.top1}),
    "perplexity": (r"perplexity (\d+\.\d+)", {"rel": 0.05}),  # 1.2 % was seen between two CPUs
    "float32 perplexity": (r"float32: (\d+\.\d+)", {"abs": 0.01}),
    "bytes": (r"size on disk: ([\d,]+) bytes", {"rel": DRIFT.size}),
    "planned bytes": (r"\(plan ([\d,]+),", {"rel": DRIFT.size}),
    "budget": (r"budget ([\d,]+)\)", {"abs": 0}),
}


@pytest.fixture(scope="module")
def printed(run_cache: RunCache) -> list[str]:
    """The lines that the export of `make demo` prints."""
    recipe = (REPO / "Makefile").read_text(encoding="utf-8").partition("\ndemo:")[2]
    command = re.search(r"\$\(BIN\)/lfmc (export [^\n]*) --output out/demo --force", recipe)
    assert command is not None

    def export(folder: Path) -> str:
        arguments = [sys.executable, "-m", "lfmc", *command[1].split(), "--output", "out/demo"]
        process = subprocess.run(
            arguments,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return process.stdout

    _, output = run_cache.make_once("make demo", export)
    return [line.rstrip() for line in output.splitlines()]


def wording(lines: list[str]) -> list[str]:
    """Return the lines without numbers, and of tables the words that do not depend on the CPU."""
    words = []
    for line in lines:
        if line[:1] in "┏┡└":
            continue
        if line[:1] in "┃│":
            cells = line.strip("┃│").split("┃" if line[0] == "┃" else "│")
            is_parity = len(cells) == 6 and not cells[1].strip().isdigit()
            line = cells[1] if is_parity else cells[0]
        words.append(re.sub(r"[\d.,]+", "#", line).strip())
    return words


def numbers(lines: list[str]) -> dict[str, float]:
    text = " ".join(lines)
    values = {}
    for name, (pattern, _) in NUMBERS.items():
        match = re.search(pattern, text)
        assert match is not None, name
        values[name] = float(match[1].replace(",", ""))
    return values


def test_the_page_has_the_words_of_a_run(printed: list[str]) -> None:
    shown = demo.read_block(demo.PAGE)
    end = next(index for index, line in enumerate(shown) if line.startswith("bundle:"))
    assert wording(shown[: end + 1]) == wording(printed)
    prompts = re.findall(r'"([^"]+)"', (REPO / "Makefile").read_text().partition("\ndemo:")[2])[:3]
    for line, prompt in zip(shown[end + 1 :], prompts, strict=True):
        assert line.startswith(prompt)


@pytest.mark.parametrize("page", [demo.PAGE, demo.README], ids=["demo.md", "README.md"])
def test_the_numbers_are_those_of_a_run(page: Path, printed: list[str]) -> None:
    shown, measured = numbers(demo.read_block(page)), numbers(printed)
    for name, (_, tolerance) in NUMBERS.items():
        assert measured[name] == pytest.approx(shown[name], **tolerance), name


def test_the_readme_shows_lines_of_the_page() -> None:
    lines = demo.read_block(demo.README)
    assert lines
    assert set(lines) <= set(demo.read_block(demo.PAGE))
