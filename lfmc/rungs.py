"""Climbing the rungs for one export: which sides are compared, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from lfmc.checkpoint import Checkpoint
from lfmc.choices import NEAR_TIE, NEAR_TIE_SHIPPED, ChoosingStepper
from lfmc.errors import GateError, InputError
from lfmc.floats import float_rungs
from lfmc.locate.place import Place
from lfmc.parity import (
    FLOAT_TOLERANCE,
    Case,
    Rung,
    cases,
    compare,
    skipped,
)
from lfmc.program import Program
from lfmc.progress import Progress
from lfmc.quality import Quality, QualityMeter, windows
from lfmc.reference import TransformersStepper, is_available
from lfmc.stepping import Stepper, TorchStepper, decoder_stepper, step_each
from lfmc.targets.base import Artifact, Request, Target
from lfmc.weights import PlannedWeights

WINDOW = 256
WINDOWS = {"full": 7, "fast": 2}
CHECKS = ("full", "fast", "off")
# Two float32 models side by side, and the codes of a third.
PARITY_BYTES_PER_PARAM = 10

TITLES = {
    1: "decoder = transformers, float32",
    2: "fused graph = decoder, same quantized weights",
    3: "artifact = same quantized weights in torch",
    4: "artifact against the float32 model, on text",
}
UNGATED = {  # by whether float activations were asked for
    True: "the same, float activations where kernels have them (no tolerance: roundings flip)",
    False: "the same, with activations rounded as shipped (no tolerance: roundings flip)",
}

REPORT = "this artifact is wrong; please report it, with the place that --trace found"
TRACE = "this artifact is wrong; --trace finds the first operator that differs; please report it"


@dataclass(frozen=True)
class Verification:
    """Every rung that was climbed, and what quantization did to the model on text."""

    rungs: tuple[Rung, ...]
    quality: Quality | None

    @property
    def failed(self) -> Rung | None:
        """The first rung that failed; a skipped one has not."""
        return next((r for r in self.rungs if r.skipped is None and not r.passed), None)

    def require(self, place: Place | None = None) -> None:
        """Raise `GateError` for the first rung that failed; `place` is where, if it was traced."""
        rung = self.failed
        if rung is None:
            return
        worst = max(rung.cases, key=lambda case: case.difference)
        raise GateError(
            f"parity rung {rung.number} failed: {rung.title}",
            where=worst.case if place is None else f"{place.where}; {worst.case}",
            expected=f"a difference of at most {rung.tolerance or math.inf:g} of the logit scale",
            got=f"{worst.difference:.3g}",
            todo=TRACE if place is None else REPORT,
        ).at(place)


def verify(
    checkpoint: Checkpoint,
    weights: PlannedWeights,
    program: Program,
    target: Target,
    folder: Path,
    artifact: Artifact,
    asked: Request,
    check: str,
    progress: Progress,
    why_not_here: str | None = None,
    text: Path | None = None,
) -> Verification:
    """Climb all four rungs for the artifact in `folder`; `check` is "full" or "fast". Rung 4 is
    on the text of a file, or on the bundled passages.

    Where there is a reason why it can't be executed here, rungs 3 and 4 are skipped with it.
    `program` is the fused, quantized program that the artifact was lowered from.
    """
    full, context = check == "full", asked.context
    matrix = cases(checkpoint.config, context, full=full)
    rungs = []
    with progress.stage("parity 1: decoder against transformers"):
        rungs.append(_decoder_rung(checkpoint, matrix, context, progress))
    program.bind(weights.value)
    with progress.stage("parity 2: graph against decoder"):
        rungs.append(_graph_rung(checkpoint, weights, program, matrix, context, progress))
    if why_not_here is not None:
        rungs += [skipped(number, TITLES[number], why_not_here) for number in (3, 4)]
        return Verification(tuple(rungs), None)
    with progress.stage("parity 3: artifact against torch"):
        rungs += artifact_rungs(target, program, folder, artifact, matrix, asked, progress)
        rungs += float_rungs(target, program, weights, asked, matrix, progress)
    with progress.stage("parity 4: quality on text"):
        judged = passages(checkpoint, min(WINDOW, context), WINDOWS[check], text)
        quality = measure_quality(checkpoint, target.run(folder), judged, progress)
    return Verification(tuple(rungs), quality)


def _decoder_rung(
    checkpoint: Checkpoint, matrix: tuple[Case, ...], context: int, progress: Progress
) -> Rung:
    if not is_available():
        return skipped(1, TITLES[1], "transformers is not installed: pip install 'lfmc[dev]'")
    return compare(
        1,
        TITLES[1],
        decoder_stepper(checkpoint.decoder(), _slots(matrix, context)),
        TransformersStepper(checkpoint),
        matrix,
        checkpoint.config.vocab_size,
        tolerance=FLOAT_TOLERANCE,
        progress=progress.step,
    )


def _graph_rung(
    checkpoint: Checkpoint,
    weights: PlannedWeights,
    program: Program,
    matrix: tuple[Case, ...],
    context: int,
    progress: Progress,
) -> Rung:
    decoder = checkpoint.decoder({name: weights.dequantized(name) for name in checkpoint.tensors})
    return compare(
        2,
        TITLES[2],
        TorchStepper(program.module, checkpoint.config, context),
        decoder_stepper(decoder, context),
        matrix,
        checkpoint.config.vocab_size,
        tolerance=FLOAT_TOLERANCE,
        progress=progress.step,
    )


def artifact_rungs(
    target: Target,
    program: Program,
    folder: Path,
    artifact: Artifact,
    matrix: tuple[Case, ...],
    asked: Request,
    progress: Progress,
) -> list[Rung]:
    """The artifact with float activations, each n-bit operator alone, and all as it ships."""
    config, context = program.config, asked.context
    rungs = [*target.operator_parity(program, folder, artifact)]
    for exact in (True, False) if target.exact else (False,):
        tolerance = target.tolerance(program, exact=exact)
        reference = target.reference(program, asked, folder, exact=exact)
        rungs.append(
            compare(
                3,
                UNGATED[exact] if tolerance is None else TITLES[3],
                target.run(folder, exact=exact),
                ChoosingStepper(reference, config, context),
                matrix,
                config.vocab_size,
                tolerance=tolerance,
                near_tie=NEAR_TIE if exact else NEAR_TIE_SHIPPED,
                progress=progress.step,
            )
        )
    return rungs


def _slots(matrix: tuple[Case, ...], context: int) -> int:
    return min(context, max(case.length for case in matrix))


def measure_quality(
    checkpoint: Checkpoint, stepper: Stepper, text: Tensor, progress: Progress
) -> Quality:
    """Rung 4: windows of text, int64 `[N, T]`, through artifact and float32 decoder."""
    reference = decoder_stepper(checkpoint.decoder(), text.shape[1])
    meter = QualityMeter()
    for index, tokens in enumerate(text):
        progress.step(f"window {index + 1} of {len(text)}")
        reference.reset()
        stepper.reset()
        theirs, ours = reference.step(tokens), step_each(stepper, tokens)
        meter.add(theirs.unsqueeze(0), ours.unsqueeze(0), tokens.unsqueeze(0))
    return meter.result()


def passages(checkpoint: Checkpoint, length: int, count: int, own: Path | None = None) -> Tensor:
    """Windows of the bundled public-domain text, or of a file in UTF-8, int64 `[N, length]`:
    `count`, or all there are; `InputError` where there is not one."""
    source = files("lfmc") / "data" / "passages.txt" if own is None else own
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the text can't be read", where=own, got=error) from error
    tokenizer = checkpoint.tokenizer()
    fitting = len(tokenizer.encode(text, add_special_tokens=False).ids) // length
    fit = max(1, min(count, fitting))
    return windows(tokenizer, text, length, fit, checkpoint.config.bos_id)
