"""Compare every n-bit operator of an artifact in isolation: same input, same weights, one kernel.

End to end, a difference of 1e-7 before an int8 rounding grows to 1e-3 after it, so the logits of a
model with rounded activations prove little. Here each reference operator gets exactly the input
that the operator had inside the artifact, and must agree to float32 precision. The exception is
rows with an activation so close to the middle of two codes that it may be rounded either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import FLOAT_TOLERANCE, CaseResult, Rung, operators_rung, skipped_rung
from lfmc.targets.base import Artifact, require
from lfmc.targets.onnx.activations import run_alone
from lfmc.targets.onnx.emitter import CONTEXT_KEY, NUM_LOGITS, model_path
from lfmc.targets.onnx.runtime import experts_are_exact

TITLE = "every n-bit operator of the artifact, alone, as shipped"
TOKENS = 100
# How far one rounding step can move a result: the tolerance of rows that depend on a tie.
TIED_TOLERANCE = 2e-2


def operator_parity(program: Program, folder: Path, artifact: Artifact) -> Rung:
    """Return the worst operator of each kind; `program` is bound to its weights."""
    if not artifact.probes:
        return skipped_rung(3, TITLE, "the artifact has no n-bit operators")
    return operators_rung(TITLE, FLOAT_TOLERANCE, _results(program, folder, artifact))


def _results(program: Program, folder: Path, artifact: Artifact) -> Iterator[CaseResult]:
    values = _run_with_values(program, folder, artifact)
    nodes = {node.name: node for node in program.graph.nodes}
    exact_experts = experts_are_exact(folder)
    for probe in artifact.probes:
        inputs = [torch.from_numpy(values[name]) for name in probe.inputs]
        expected, ties = run_alone(program, nodes[probe.node], inputs, exact_experts=exact_experts)
        actual = torch.from_numpy(values[probe.output])
        yield _compare_rows(probe.kind, actual.reshape(expected.shape), expected, ties)


def _compare_rows(kind: str, actual: Tensor, expected: Tensor, ties: Tensor) -> CaseResult:
    """Return the largest difference of a row, relative to the largest result.

    Rows that depend on a tie count only if they differ by more than a rounding step. If all rows
    depend on a tie, the better half must agree, because most ties are rounded to the same side.
    """
    scale = expected.abs().max().clamp_min(1e-30)
    rows = (actual - expected).abs().flatten(0, -2).amax(-1) / scale
    rows = rows.nan_to_num(nan=torch.inf)
    untied = rows[~ties] if not bool(ties.all()) else rows.sort().values[: -(-len(rows) // 2)]
    worst = max(float(untied.max()), float(rows.max()) if rows.max() > TIED_TOLERANCE else 0.0)
    agreement = (actual.argmax(-1) == expected.argmax(-1)).float().mean()
    return CaseResult(kind, worst, float(agreement))


def _run_with_values(
    program: Program, folder: Path, artifact: Artifact
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Run a prompt, and return the inputs and outputs of every probed operator by name."""
    onnx, ort = require("onnx", "onnx"), require("onnxruntime", "onnx")
    path = model_path(folder)
    model = onnx.load(path, load_external_data=False)
    graph_inputs = {value.name for value in model.graph.input}
    graph_outputs = {value.name for value in model.graph.output}
    probe_names = {name for probe in artifact.probes for name in (*probe.inputs, probe.output)}
    for name in sorted(probe_names - graph_inputs - graph_outputs):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(path.parent))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    context = int(json.loads(session.get_modelmeta().custom_metadata_map[CONTEXT_KEY]))
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(TOKENS, context))
    ids = torch.randint(program.config.vocab_size, shape, generator=generator).numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones(shape, np.int64)}
    for value in session.get_inputs():
        if value.name == NUM_LOGITS:
            feeds[value.name] = np.zeros((), np.int64)  # of every token
        elif value.name not in feeds:
            sizes = {"batch": 1, "batch_size": 1, "past": 0}
            dims = [sizes.get(d, d) for d in value.shape]
            feeds[value.name] = np.zeros(dims, np.float32)
    names = sorted(probe_names - graph_inputs)
    results = dict(zip(names, session.run(names, feeds), strict=True))
    return {**feeds, **results}
