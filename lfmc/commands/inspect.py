"""`lfmc inspect`: show a checkpoint's layers, parameters and memory use."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from lfmc.commands.options import (
    adapter_option,
    force_option,
    json_option,
    model_argument,
    report_option,
    require_absent,
    write_text,
)
from lfmc.commands.progress import announce


@click.command("inspect")
@model_argument
@adapter_option
@report_option
@force_option
@json_option
def command(
    model: str | None, adapter: str | None, report: Path | None, force: bool, as_json: bool
) -> None:
    """Show MODEL's layers, parameters by role and memory use by context length.

    Memory is the weights as stored plus the states (KV cache and convolution states, float32) of
    one conversation. For comparison, the table estimates a model of the same depth with full
    attention in every layer.
    """
    from rich.table import Table

    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.commands.fitted_table import FittedTable
    from lfmc.commands.tables import console, memory_table
    from lfmc.report.model_facts import gather_model

    require_absent(report, force)
    checkpoint = open_checkpoint(model, adapter)
    announce(checkpoint, model)
    config = checkpoint.config
    facts = gather_model(checkpoint)
    if report is not None:
        from lfmc.report.model_page import model_page

        write_text(report, model_page(facts))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": facts.name,
                    "type": config.model_type,
                    "parameters": facts.parameters,
                    "tensors": len(checkpoint.tensors),
                    "layers": facts.layers,
                    "roles": facts.roles,
                    "max_context": config.max_context,
                    "stop_ids": checkpoint.stop_ids,
                    "memory": [
                        {
                            **asdict(f),
                            "total": f.total,
                            "all_attention_total": f.all_attention_total,
                        }
                        for f in facts.memory
                    ],
                }
            )
        )
        return
    terminal = console()
    terminal.print(f"{facts.name}: {config.model_type}, {facts.parameters:,} parameters")
    layers = ", ".join(f"{count} {kind}" for kind, count in facts.layers.items())
    terminal.print(f"layers: {layers}")
    if config.moe:
        terminal.print(
            f"experts: {config.moe.num_experts}, {config.moe.top_k} per token, "
            f"dense below layer {config.moe.num_dense_layers}"
        )
    table = Table("role", "parameters", "share")
    for name, count in Counter(facts.roles).most_common():
        table.add_row(name, f"{count:,}", f"{100 * count / facts.parameters:.1f} %")
    terminal.print(FittedTable(table))
    terminal.print(memory_table(facts.memory))
    if report is not None:
        click.echo(f"report: {report}")
