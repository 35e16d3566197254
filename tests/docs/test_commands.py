"""lfmc parses every command in the pages; blocks that are marked with `run` are run."""

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
from lfmc.lowering.request import Options, make_request
from lfmc.targets.base import get_target
from tests.docs.blocks import PAGES, Block, commands, name_of, runnable, spans

BITS = {None, "auto", "alphaq", "uniform", "none", "2", "3", "4", "6", "8"}
LETTERS = re.compile(r"--?[a-zA-Z][\w-]*")


def parse(arguments: list[str]) -> click.Context:
    """Return the context of a subcommand; raise click's exceptions for a wrong command."""
    with cli.make_context("lfmc", list(arguments)) as outer:
        name, command, rest = cli.resolve_command(outer, [*outer._protected_args, *outer.args])
        assert name is not None
        assert command is not None
        return command.make_context(name, rest, parent=outer)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_valid(page: Path) -> None:
    for arguments in commands(page):
        try:
            context = parse(arguments)
        except click.exceptions.Exit:  # --help, --version
            continue
        except click.ClickException as error:
            pytest.fail(f"lfmc {' '.join(arguments)}: {error.format_message()}")
        params = context.params
        assert params.get("bits") in BITS, arguments
        if context.info_name == "export":
            check_export(params, arguments)


def check_export(params: dict[str, object], arguments: list[str]) -> None:
    """Assert that the target accepts these options for the checkpoint that ships with lfmc."""
    if params["target"] == "toy":  # an example: tests/docs/test_toy_target.py installs it
        return
    flags = {name: str(params[name]) for name in ("device", "soc", "accelerator") if params[name]}
    target_options = {**dict(params["target_options"]), **flags}  # type: ignore[call-overload]
    options = Options(
        bits=params["bits"],  # type: ignore[arg-type]
        target_options=target_options,
        check=str(params["check"]),
        max_kl=params["max_kl"],  # type: ignore[arg-type]
        min_top1=params["min_top1"],  # type: ignore[arg-type]
    )
    try:
        make_request(open_checkpoint(), get_target(str(params["target"])), options)
    except UnsupportedError:  # by this machine, or for this checkpoint (mostly experts)
        assert params["target"], arguments


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_inside_sentences_exist(page: Path) -> None:
    for text in spans(page):
        words = text.split()
        if len(words) < 2 or words[1] not in COMMANDS:
            assert words[1].startswith(("-", "|")) or not words[1].islower(), text
            continue
        flags = {
            name for p in get_command(words[1]).params for name in (*p.opts, *p.secondary_opts)
        }
        flags |= {"-h", "--help"}
        for flag in (word for word in words[2:] if LETTERS.fullmatch(word)):
            assert flag in flags or flag.endswith("-..."), text


def get_command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def test_wrong_commands_are_errors() -> None:
    with pytest.raises(click.NoSuchOption):
        parse(["export", "--no-such-flag"])
    with pytest.raises(click.UsageError):
        parse(["explode"])
    with pytest.raises(click.BadParameter):
        parse(["plan", "--bits-per-weight", "many"])


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
    """Run a block with bash in `folder`, with the lfmc of this environment; check the exit code."""
    for tool in block.needs:
        if shutil.which(tool) is None and find_spec(tool) is None:
            pytest.skip(f"'{tool}' is not installed")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert process.returncode == block.exit_code, (
        f"{block.text}\n{process.stdout}\n{process.stderr}"
    )
