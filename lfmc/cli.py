"""The command line: subcommands are imported when they are called, so `--help` is quick."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import click

from lfmc.errors import GateError, LfmcError
from lfmc.version import __version__

# name: (module that defines `command`, what `lfmc --help` says)
COMMANDS = {
    "doctor": ("lfmc.commands.doctor", "Check this machine: packages, versions, memory, targets."),
    "inspect": ("lfmc.commands.inspect", "Show what a checkpoint holds, and memory by context."),
    "plan": ("lfmc.commands.plan", "Choose bits for every tensor and write the plan."),
    "export": ("lfmc.commands.export", "Quantize, lower and verify: checkpoint to bundle."),
    "init": ("lfmc.commands.init", "Write a .lfmc.toml for a checkpoint."),
    "check": ("lfmc.commands.check", "Export, verify and gate a matrix of cells (.lfmc.toml)."),
    "verify": ("lfmc.commands.verify", "Prove a bundle again, from its files."),
    "diff": ("lfmc.commands.diff", "Compare two bundles or plans: bits, sizes, quality."),
    "generate": ("lfmc.commands.generate", "Continue a prompt with a bundle."),
    "bench": ("lfmc.commands.bench", "Time prefill and decode of a bundle."),
}


class LazyGroup(click.Group):
    """Knows its subcommands by name and imports one only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lfmc")
def cli() -> None:
    """Quantize and export Liquid Foundation Models, with every artifact proven.

    \b
    lfmc export MODEL --target onnx --bits auto
    lfmc generate BUNDLE "Once upon a time"

    MODEL is a checkpoint folder or a hub id; without it, a small one that ships with lfmc is used.
    Results go to stdout, progress to stderr. Exit codes: 0 ok, 1 a fault of lfmc, 2 wrong input,
    3 parity, quality or budget not met, 4 not supported or a package is missing.
    """


def main() -> None:
    """Entry point: errors that a user can act on are printed without a traceback."""
    try:
        code = cli(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LfmcError as error:
        if "--json" in sys.argv:
            details: dict[str, object] = {
                "error": error.what,
                "exit_code": error.exit_code,
                "details": str(error),
            }
            if isinstance(error, GateError) and error.place is not None:
                details["place"] = error.place.to_dict()
            click.echo(json.dumps(details))
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
