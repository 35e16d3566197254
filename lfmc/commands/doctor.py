"""`lfmc doctor`: compare this machine's packages with the tested versions, and list targets."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from lfmc.commands.options import json_option

if TYPE_CHECKING:
    from lfmc.targets.base import Target


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check this machine: Python, memory, disk space, packages and targets.

    Compares installed packages with the versions that lfmc was tested with. Lists every target
    with the packages that it is missing and with its options (-O NAME=VALUE).
    """
    from rich.table import Table

    from lfmc.commands.fitted_table import FittedTable
    from lfmc.commands.tables import console
    from lfmc.machine.memory import installed_nbytes
    from lfmc.machine.versions import TESTED, installed_version
    from lfmc.targets.base import get_target, install_advice, target_names

    packages = {name: (installed_version(name), tested) for name, tested in TESTED.items()}
    targets = {name: get_target(name) for name in target_names()}
    missing_packages = {
        name: [package for package in target.packages if find_spec(package) is None]
        for name, target in targets.items()
    }
    tools = {name: target.missing_tools() for name, target in targets.items()}
    memory = installed_nbytes()
    disk = shutil.disk_usage(".").free
    if as_json:
        facts = {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "memory_nbytes": memory,
            "disk_free_nbytes": disk,
            "packages": {n: {"installed": i, "tested": t} for n, (i, t) in packages.items()},
            "targets": {
                name: {
                    "ready": not missing and not _missing_by_default(targets[name], tools[name]),
                    "missing": missing,
                    "missing_tools": {choice: list(t) for choice, t in tools[name].items()},
                    "options": {o.name: o.choices for o in targets[name].options},
                }
                for name, missing in missing_packages.items()
            },
        }
        click.echo(json.dumps(facts))
        return
    terminal = console()
    terminal.print(
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, {memory / 2**30:.1f} GiB of memory, "
        f"{disk / 2**30:.1f} GiB free on disk"
    )
    table = Table("package", "installed", "tested", "")
    for name, (version, tested) in packages.items():
        verdict = "not installed" if version is None else "" if version == tested else "not tested"
        if version and version.partition("+")[0] == tested:
            verdict = "ok"
        table.add_row(name, version or "-", tested, verdict)
    terminal.print(FittedTable(table))
    for name, missing in missing_packages.items():
        target = targets[name]
        blocked = _missing_by_default(target, tools[name])
        state = "ready"
        if missing:
            state = f"missing {', '.join(missing)}: {install_advice(target.extra)}"
        elif blocked:
            state = f"not ready: an export with the default options needs {', '.join(blocked)}"
        terminal.print(f"target {name}: {state}", markup=False)
        for choice, choice_tools in tools[name].items():
            terminal.print(f"  {choice} needs {', '.join(choice_tools)}", markup=False)
        for option in target.options:
            choices = " | ".join(option.choices)
            terminal.print(f"  -O {option.name}={choices}: {option.help}", markup=False)


def _missing_by_default(target: Target, missing: Mapping[str, Sequence[str]]) -> list[str]:
    """Return those of the missing tools that an export with default options needs."""
    defaults = {f"{option.name}={option.choices[0]}" for option in target.options}
    return [tool for choice, tools in missing.items() if choice in defaults for tool in tools]
