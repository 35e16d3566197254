"""`lfmc doctor`: what this machine has, next to what was tested."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.util import find_spec

import click

from lfmc.commands.options import json_option


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check Python, packages against the tested versions, memory, disk and targets."""
    from rich.table import Table

    from lfmc.commands.tables import console
    from lfmc.machine.memory import installed_nbytes
    from lfmc.machine.versions import TESTED, installed
    from lfmc.targets.base import get_target, install_advice, target_names

    packages = {name: (installed(name), tested) for name, tested in TESTED.items()}
    targets = {
        name: [package for package in get_target(name).packages if find_spec(package) is None]
        for name in target_names()
    }
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
                    "ready": not missing,
                    "missing": missing,
                    "missing_tools": {
                        k: list(v) for k, v in get_target(name).missing_tools().items()
                    },
                    "options": {o.name: o.choices for o in get_target(name).options},
                }
                for name, missing in targets.items()
            },
        }
        click.echo(json.dumps(facts))
        return
    out = console()
    out.print(
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, {memory / 2**30:.1f} GiB of memory, "
        f"{disk / 2**30:.1f} GiB free on disk"
    )
    table = Table("package", "installed", "tested", "")
    for name, (found, tested) in packages.items():
        verdict = "not installed" if found is None else "" if found == tested else "not tested"
        if found and found.partition("+")[0] == tested:
            verdict = "ok"
        table.add_row(name, found or "-", tested, verdict)
    out.print(table)
    for name, missing in targets.items():
        remedy = install_advice(get_target(name).extra)
        state = f"missing {', '.join(missing)}: {remedy}" if missing else "ready"
        out.print(f"target {name}: {state}")
        for choice, tools in get_target(name).missing_tools().items():
            out.print(f"  {choice} needs {', '.join(tools)}", markup=False)
        for option in get_target(name).options:
            choices = " | ".join(option.choices)
            out.print(f"  -O {option.name}={choices}: {option.help}", markup=False)
