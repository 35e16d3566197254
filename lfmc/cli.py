"""The command line. Subcommands are imported when they are called, so that `--help` is fast."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import click

from lfmc.errors import GateError, LfmcError
from lfmc.version import __version__

# name: (module that defines `command`, one-line description in `lfmc --help`)
COMMANDS = {
    "doctor": ("lfmc.commands.doctor", "Check this machine: packages, versions, memory, targets."),
    "inspect": ("lfmc.commands.inspect", "Show a checkpoint's layers, parameters and memory use."),
    "plan": ("lfmc.commands.plan", "Choose a bit width for every tensor and write the plan."),
    "export": ("lfmc.commands.export", "Quantize a checkpoint, export it and verify the result."),
    "init": ("lfmc.commands.init", "Write a .lfmc.toml, the configuration of `lfmc check`."),
    "check": ("lfmc.commands.check", "Export and verify every configuration of a .lfmc.toml."),
    "verify": ("lfmc.commands.verify", "Verify an exported bundle again."),
    "diff": ("lfmc.commands.diff", "Compare two bundles or plans: bits, sizes, quality."),
    "generate": ("lfmc.commands.generate", "Generate text with a bundle."),
    "bench": ("lfmc.commands.bench", "Measure prefill and decode speed of a bundle."),
}


class LazyGroup(click.Group):
    """A command group that imports a subcommand only to run it or to show its help."""

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
    """Quantize and export Liquid Foundation Models. Every exported model is run and checked
    against the original.

    \b
    lfmc export MODEL --target onnx --bits auto
    lfmc generate BUNDLE "Once upon a time"

    MODEL is a checkpoint folder or a Hugging Face id. The default is a tiny test model that ships
    with lfmc. BUNDLE is a folder that `lfmc export` wrote.

    Results go to stdout, progress goes to stderr. Exit codes: 0 success, 1 a bug in lfmc, 2 wrong
    input, 3 parity, quality or budget not met, 4 not supported or a package is missing.
    """


def main() -> None:
    """Run the command line. Errors that a user can act on are printed without a traceback."""
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
