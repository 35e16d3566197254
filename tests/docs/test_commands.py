"""Every command in the pages is one that lfmc takes, and those marked so are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.cli import COMMANDS, cli
from lfmc.errors import UnsupportedError
from lfmc.lowering.request import Options, request
from lfmc.targets.base import get_target
from tests.docs.blocks import PAGES, Block, commands, name_of, runnable, spans

BITS = {None, "auto", "alphaq", "uniform", "none", "2", "3", "4", "6", "8"}
LETTERS = re.compile(r"--?[a-zA-Z][\w-]*")


def parsed(arguments: list[str]) -> click.Context:
    """The context of a subcommand; raises what click raises for a wrong command line."""
    with cli.make_context("lfmc", list(arguments)) as outer:
        name, command, rest = cli.resolve_command(outer, [*outer._protected_args, *outer.args])
        assert name is not None
        assert command is not None
        return command.make_context(name, rest, parent=outer)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken(page: Path) -> None:
    for arguments in commands(page):
        try:
            context = parsed(arguments)
        except click.exceptions.Exit:  # --help, --version
            continue
        except click.ClickException as error:
            pytest.fail(f"lfmc {' '.join(arguments)}: {error.format_message()}")
        given = context.params
        assert given.get("bits") in BITS, arguments
        if context.info_name == "export":
            check_export(given, arguments)


def check_export(given: dict[str, object], arguments: list[str]) -> None:
    """The target takes these options; for the checkpoint that ships with lfmc or for another."""
    if given["target"] == "toy":  # an example: tests/docs/test_toy_target.py installs it
        return
    flags = {name: str(given[name]) for name in ("device", "soc", "accelerator") if given[name]}
    chosen = {**dict(given["target_options"]), **flags}  # type: ignore[call-overload]
    options = Options(
        bits=given["bits"],  # type: ignore[arg-type]
        target_options=chosen,
        check=str(given["check"]),
        max_kl=given["max_kl"],  # type: ignore[arg-type]
        min_top1=given["min_top1"],  # type: ignore[arg-type]
    )
    try:
        request(open_checkpoint(), get_target(str(given["target"])), options)
    except UnsupportedError:  # of this machine, or of this checkpoint: experts, mostly
        assert given["target"], arguments


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_within_sentences_exist(page: Path) -> None:
    for text in spans(page):
        words = text.split()
        if len(words) < 2 or words[1] not in COMMANDS:
            assert words[1].startswith(("-", "|")) or not words[1].islower(), text
            continue
        known = {
            name for p in parsed_command(words[1]).params for name in (*p.opts, *p.secondary_opts)
        }
        known |= {"-h", "--help"}
        for flag in (word for word in words[2:] if LETTERS.fullmatch(word)):
            assert flag in known or flag.endswith("-..."), text


def parsed_command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def test_wrong_commands_are_noticed() -> None:
    with pytest.raises(click.NoSuchOption):
        parsed(["export", "--no-such-flag"])
    with pytest.raises(click.UsageError):
        parsed(["explode"])
    with pytest.raises(click.BadParameter):
        parsed(["plan", "--bits-per-weight", "many"])


RUN = [page for page in PAGES if any(not block.slow for block in runnable(page))]
RUN_SLOW = [page for page in PAGES if any(block.slow for block in runnable(page))]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    for block in runnable(page):
        if not block.slow:
            run(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_SLOW, ids=name_of)
def test_all_blocks_run(page: Path, tmp_path: Path) -> None:
    for block in runnable(page):
        run(block, tmp_path)


def run(block: Block, folder: Path) -> None:
    """Run a block by bash in `folder`, with this environment's lfmc, and compare its exit code."""
    for tool in block.needs:
        if shutil.which(tool) is None and find_spec(tool) is None:
            pytest.skip(f"'{tool}' is not on this machine")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == block.exit_code, f"{block.text}\n{done.stdout}\n{done.stderr}"
