"""Runs the four parity rungs for one export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.footprint import largest_layer, require_memory
from lfmc.errors import GateError, InputError
from lfmc.lowering.build import Build
from lfmc.machine.progress import Progress
from lfmc.parity.compare import (
    FLOAT_TOLERANCE,
    Case,
    Rung,
    cases,
    compare,
    skipped_rung,
)
from lfmc.parity.expert_choices import NEAR_TIE, NEAR_TIE_SHIPPED
from lfmc.parity.place import Place
from lfmc.parity.text_quality import Quality, QualityMeter, windows
from lfmc.reference.layerwise_decoder import LayerwiseDecoder
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.reference.transformers_model import LayerwiseTransformers, is_available
from lfmc.run.conversation import Conversation
from lfmc.run.stepper import Stepper, step_all_logits
from lfmc.targets.base import Artifact, Request, Target
from lfmc.verification.float_twin import run_float_rungs

WINDOW = 256
WINDOWS = {"full": 7, "fast": 2}
FLOAT32 = 4
LAYER_COPIES = 2  # of a layer in float32: the module, and the tensor that is being loaded
BASE_NBYTES = 2 << 30  # the libraries, a runtime's buffers, logits and hidden states

TITLES = {
    1: "lfmc decoder vs. transformers, float32",
    2: "fused graph vs. decoder, same quantized weights",
    3: "exported artifact vs. torch, same quantized weights",
    4: "artifact vs. float32 model, on text",
}
INFORMATIONAL_TITLES = {  # of rungs without a tolerance; True: float activations were requested
    True: "artifact vs. torch, float where possible (informational: int8 rounding may differ)",
    False: "artifact as shipped vs. torch (informational: int8 rounding may differ)",
}

REPORT_TODO = "this artifact is wrong; please report it, with the place that --trace prints"
TRACE_TODO = (
    "this artifact is wrong; --trace finds the first operator that differs; please report it"
)


@dataclass(frozen=True)
class Verification:
    """The results of all rungs, and the quality of the artifact on text."""

    rungs: tuple[Rung, ...]
    quality: Quality | None

    @property
    def failed(self) -> Rung | None:
        """The first rung that failed; a skipped rung has not failed."""
        return next((rung for rung in self.rungs if rung.skipped is None and not rung.passed), None)

    def require(self, place: Place | None = None) -> None:
        """Raise `GateError` for the first failed rung, with its `place` if it was traced."""
        rung = self.failed
        if rung is None:
            return
        worst = max(rung.cases, key=lambda case: case.difference)
        tolerance = math.inf if rung.tolerance is None else rung.tolerance
        raise GateError(
            f"parity rung {rung.number} failed: {rung.title}",
            where=worst.case if place is None else f"{place.where}; {worst.case}",
            expected=f"a difference of at most {tolerance:g}",
            got=f"{worst.difference:.3g}",
            todo=TRACE_TODO if place is None else REPORT_TODO,
        ).at(place)


def verify(
    build: Build,
    folder: Path,
    artifact: Artifact,
    check: str,
    text: Path | None,
    progress: Progress,
) -> Verification:
    """Run all four rungs for the artifact in `folder`; `check` is "full" or "fast".

    Rung 4 runs on the text of a file, or on the bundled passages if `text` is None. If this machine
    can't execute the artifact, rungs 3 and 4 are skipped with the reason.
    """
    checkpoint, context = build.checkpoint, build.request.context
    matrix = cases(checkpoint.config, context, full=check == "full")
    rungs = []
    with progress.stage("parity 1: decoder against transformers", ("lfmc", "transformers")):
        rungs.append(_run_decoder_rung(checkpoint, matrix, context, progress))
    with progress.stage("parity 2: graph against decoder", ("graph", "decoder")):
        rungs.append(_run_graph_rung(build, matrix, progress))
    why_not_here = build.target.why_not_here(build.request)
    if why_not_here is not None:
        rungs += [skipped_rung(number, TITLES[number], why_not_here) for number in (3, 4)]
        return Verification(tuple(rungs), None)
    with progress.stage("parity 3: artifact against torch"):
        rungs += run_artifact_rungs(build, folder, artifact, matrix)
        rungs += run_float_rungs(build, matrix)
    with progress.stage("parity 4: quality on text", ("window",)):
        tokens = read_passages(checkpoint, min(WINDOW, context), WINDOWS[check], text)
        quality = measure_quality(checkpoint, build.target.run(folder), tokens, progress)
    return Verification(tuple(rungs), quality)


def count_rungs(target: Target, request: Request) -> int:
    """Return how many rungs `verify` runs: 3 and 4 need a machine that can execute the artifact."""
    return 4 if target.why_not_here(request) is None else 2


def require_parity_memory(checkpoint: Checkpoint, todo: str) -> None:
    """Raise `UnsupportedError` if this machine has less memory than the rungs require.

    They have one layer in memory at a time, whatever the size of the model.
    """
    nbytes = BASE_NBYTES + LAYER_COPIES * FLOAT32 * largest_layer(checkpoint)
    require_memory(checkpoint, nbytes, "parity", todo)


def _run_decoder_rung(
    checkpoint: Checkpoint, matrix: tuple[Case, ...], context: int, progress: Progress
) -> Rung:
    if not is_available():
        return skipped_rung(
            1, TITLES[1], "transformers is not installed: pip install 'lfmc[reference]'"
        )
    slots = min(context, max(case.length for case in matrix))
    decoder = LayerwiseDecoder(
        checkpoint.config, checkpoint.weights, slots, progress=_named("lfmc", progress)
    )
    reference = LayerwiseTransformers(checkpoint, progress=_named("transformers", progress))
    return compare(
        1,
        TITLES[1],
        decoder,
        reference,
        matrix,
        checkpoint.config.vocab_size,
        tolerance=FLOAT_TOLERANCE,
    )


def _run_graph_rung(build: Build, matrix: tuple[Case, ...], progress: Progress) -> Rung:
    config, context = build.checkpoint.config, build.request.context
    graph = LayerwiseProgram(build.program, context, progress=_named("graph", progress))
    decoder = LayerwiseDecoder(
        config, build.weights.dequantized_tensors, context, progress=_named("decoder", progress)
    )
    return compare(
        2, TITLES[2], graph, decoder, matrix, config.vocab_size, tolerance=FLOAT_TOLERANCE
    )


def _named(model: str, progress: Progress) -> Callable[[str], None]:
    """Return a function that reports the progress of one of two models."""
    return lambda detail: progress.step(f"{model}, {detail}")


def run_artifact_rungs(
    build: Build,
    folder: Path,
    artifact: Artifact,
    matrix: tuple[Case, ...],
) -> list[Rung]:
    """Run rung 3: each n-bit operator, then the artifact with float activations and as shipped."""
    rungs = [*build.target.operator_parity(build.program, folder, artifact)]
    for exact in (True, False) if build.target.exact else (False,):
        title = INFORMATIONAL_TITLES[exact] if build.tolerance(exact=exact) is None else TITLES[3]
        near_tie = NEAR_TIE if exact else NEAR_TIE_SHIPPED
        rungs.append(build.compare(title, folder, matrix, exact=exact, near_tie=near_tie))
    return rungs


def measure_quality(
    checkpoint: Checkpoint, stepper: Stepper, text: Tensor, progress: Progress
) -> Quality:
    """Run rung 4: windows of text, int64 `[N, T]`, on the artifact and on the float32 decoder."""
    decoder = LayerwiseDecoder(checkpoint.config, checkpoint.weights, text.shape[1])
    hidden = decoder.hidden([Conversation((tokens,)) for tokens in text])
    head, meter = decoder.head(), QualityMeter()
    for index, (tokens, rows) in enumerate(zip(text, hidden, strict=True)):
        progress.step(f"window {index + 1} of {len(text)}")
        stepper.reset()
        expected, actual = F.linear(rows, head), step_all_logits(stepper, tokens)
        meter.add(expected.unsqueeze(0), actual.unsqueeze(0), tokens.unsqueeze(0))
    return meter.result()


def read_passages(
    checkpoint: Checkpoint, length: int, count: int, path: Path | None = None
) -> Tensor:
    """Return windows of the bundled public-domain text, or of a UTF-8 file, int64 `[N, length]`.

    `N` is `count`, or fewer for a shorter text. Raises `InputError` for a text below one window.
    """
    source = files("lfmc") / "data" / "passages.txt" if path is None else path
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the text can't be read", where=path, got=error) from error
    tokenizer = checkpoint.tokenizer()
    num_windows = len(tokenizer.encode(text, add_special_tokens=False).ids) // length
    num_windows = max(1, min(count, num_windows))
    return windows(tokenizer, text, length, num_windows, checkpoint.config.bos_id)
