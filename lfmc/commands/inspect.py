"""`lfmc inspect`: what a checkpoint holds, and the memory it takes at a length."""

from __future__ import annotations

import json
from collections import Counter

import click

from lfmc.commands.options import announce, json_option, model_argument


@click.command("inspect")
@model_argument
@json_option
def command(model: str | None, as_json: bool) -> None:
    """Show layers, parameters by role, and memory of states by context length."""
    from rich.table import Table

    from lfmc.calib_free.roles import role
    from lfmc.checkpoint import open_checkpoint
    from lfmc.commands.tables import MIB, console
    from lfmc.memory import state_nbytes

    checkpoint = open_checkpoint(model)
    announce(checkpoint, model)
    config = checkpoint.config
    roles: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        roles[role(info.name, info.shape)] += info.numel
    lengths = [n for n in (512, 2048, 8192, 32768, 131072) if n <= config.max_context]
    lengths = lengths or [config.max_context]
    memory = {n: state_nbytes(config, n) for n in lengths}
    layers = Counter(config.layer_types)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": checkpoint.name,
                    "type": config.model_type,
                    "parameters": checkpoint.num_params,
                    "tensors": len(checkpoint.tensors),
                    "layers": dict(layers),
                    "roles": dict(roles),
                    "max_context": config.max_context,
                    "stop_ids": checkpoint.stop_ids,
                    "state_nbytes": {str(n): vars(m) for n, m in memory.items()},
                }
            )
        )
        return
    out = console()
    out.print(f"{checkpoint.name}: {config.model_type}, {checkpoint.num_params:,} parameters")
    out.print("layers: " + ", ".join(f"{count} {kind}" for kind, count in layers.items()))
    if config.moe:
        out.print(
            f"experts: {config.moe.num_experts}, {config.moe.top_k} a token, "
            f"dense below layer {config.moe.num_dense_layers}"
        )
    table = Table("role", "parameters", "share")
    for name, count in roles.most_common():
        table.add_row(name, f"{count:,}", f"{100 * count / checkpoint.num_params:.1f} %")
    out.print(table)
    table = Table("context", "keys and values, MiB", "conv states, MiB")
    for length, used in memory.items():
        table.add_row(f"{length:,}", f"{used.attention / MIB:.2f}", f"{used.conv / MIB:.3f}")
    out.print(table)
