"""Every n-bit operator of an artifact on its own: same input, same weights, one kernel.

Compared end to end, a difference of 1e-7 before an int8 rounding grows into one of 1e-3 behind it,
so the logits of a model with rounded activations prove little. Here each operator is given exactly
the input that it had inside of the artifact, and must agree to float32 precision; but for the odd
row in which an activation lies so close to the middle of two roundings that it may fall either way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.parity import CaseResult, Rung
from lfmc.program import Program
from lfmc.targets.base import Artifact, require
from lfmc.targets.onnx.activations import run_alone
from lfmc.targets.onnx.emitter import MODEL_FILE

TITLE = "every n-bit operator of the artifact, alone, as shipped"
TOLERANCE = 1e-5
TOKENS = 100
# Rows in which a tie may have fallen the other way, and how far such a step can move a result.
TIED_SHARE = 0.1
TIED_DIFFERENCE = 2e-2


def operator_parity(program: Program, folder: Path, artifact: Artifact) -> Rung:
    """The worst operator of each kind; `program` is bound to its weights."""
    values = _run_with_values(program, folder, artifact)
    nodes = {node.name: node for node in program.graph.nodes}
    worst: dict[str, CaseResult] = {}
    for probe in artifact.probes:
        inputs = [torch.from_numpy(values[name]) for name in probe.inputs]
        expected = run_alone(program, nodes[probe.node], inputs)
        found = torch.from_numpy(values[probe.output])
        result = _by_rows(probe.kind, found.reshape(expected.shape), expected)
        if probe.kind not in worst or result.difference > worst[probe.kind].difference:
            worst[probe.kind] = result
    if not worst:
        return Rung(3, TITLE, None, skipped="the artifact has no n-bit operators")
    return Rung(3, TITLE, TOLERANCE, tuple(worst.values()))


def _by_rows(kind: str, found: Tensor, expected: Tensor) -> CaseResult:
    """The largest difference of a row, over the largest result, without the few tied rows."""
    rows = (found - expected).abs().flatten(0, -2).amax(-1) / expected.abs().max().clamp_min(1e-30)
    tied = int(TIED_SHARE * len(rows))
    ordered = rows.nan_to_num(nan=torch.inf).sort(descending=True).values
    if float(ordered[0]) <= TIED_DIFFERENCE:
        ordered = ordered[tied:]
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return CaseResult(kind, float(ordered[0]), float(same))


def _run_with_values(
    program: Program, folder: Path, artifact: Artifact
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Run a prompt and keep what goes into and comes out of every probed operator."""
    onnx, ort = require("onnx", "onnx"), require("onnxruntime", "onnx")
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    given = {value.name for value in model.graph.input}
    declared = {value.name for value in model.graph.output}
    wanted = {name for probe in artifact.probes for name in (*probe.inputs, probe.output)}
    for name in sorted(wanted - given - declared):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(program.config.vocab_size, (1, TOKENS), generator=generator).numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, TOKENS), np.int64)}
    for value in session.get_inputs():
        if value.name not in feeds:
            shape = [{"batch": 1, "past": 0}.get(d, d) for d in value.shape]
            feeds[value.name] = np.zeros(shape, np.float32)
    names = sorted(wanted - given)
    results = dict(zip(names, session.run(names, feeds), strict=True))
    return {**feeds, **results}
