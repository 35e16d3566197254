"""The command line. Subcommands are imported when they are called, so that `--help` is fast."""

from __future__ import annotations

import json
import os
import select
import sys
from importlib import import_module

import click

from lfmc.errors import GateError, LfmcError, did_you_mean
from lfmc.machine.progress import write_stderr
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a subcommand; the error for an unknown one names a similar one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            advice = did_you_mean(name, COMMANDS) or f"The commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command '{name}': {advice}", ctx)
        return super().resolve_command(ctx, args)

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
    lfmc generate BUNDLE "Why is the sky blue?"

    MODEL is a checkpoint folder or a Hugging Face id. The default is a tiny test model that ships
    with lfmc. BUNDLE is a folder that `lfmc export` wrote.

    Results go to stdout, progress goes to stderr. Exit codes: 0 success, 1 a bug in lfmc, 2 wrong
    input, 3 parity, quality or budget not met, 4 not supported or a package is missing.
    """


def main() -> None:
    """Run the command line. Errors that a user can act on are printed without a traceback.

    If nobody reads stdout any more (`lfmc ... | head -1`), the command ends quietly, with code 0.
    """
    code: int | str | None = 0
    try:
        try:
            code = _run()
        except SystemExit as error:
            if isinstance(error.__context__, BrokenPipeError):  # click exits if a pipe is closed
                raise error.__context__ from None
            code = error.code
        sys.stdout.flush()  # a closed pipe shows here, not when Python exits
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in a buffer
    sys.exit(code)


def _run() -> int:
    """Run the command line; return the exit code."""
    try:
        code = cli(standalone_mode=False, prog_name="lfmc")
    except LfmcError as error:
        details: dict[str, object] = {"details": str(error)}
        if isinstance(error, GateError) and error.place is not None:
            details["place"] = error.place.to_dict()
        _print_json_error(error.what, error.exit_code, details)
        write_stderr(f"error: {error}")
        return error.exit_code
    except click.ClickException as error:
        message = error.format_message()
        _print_json_error(message, error.exit_code, {"details": message})
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        write_stderr("interrupted; nothing was written")
        return 130
    return code if isinstance(code, int) else 0


def _print_json_error(message: str, exit_code: int, details: dict[str, object]) -> None:
    """Print an error as JSON on stdout, if the command line asks for JSON."""
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": message, "exit_code": exit_code, **details}))


def _is_stdout_closed() -> bool:
    """Return whether nobody reads stdout any more."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(1, 0)  # closed ends are always reported
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    main()
