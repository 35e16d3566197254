"""Climbing the rungs for one export: which sides are compared, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError, InputError
from lfmc.lowering.build import Build
from lfmc.machine.memory import require_memory
from lfmc.machine.progress import Progress
from lfmc.parity.compare import (
    FLOAT_TOLERANCE,
    Case,
    Rung,
    cases,
    compare,
    skipped,
)
from lfmc.parity.expert_choices import NEAR_TIE, NEAR_TIE_SHIPPED
from lfmc.parity.place import Place
from lfmc.parity.text_quality import Quality, QualityMeter, windows
from lfmc.parity.transformers_reference import TransformersStepper, is_available
from lfmc.run.stepper import Stepper, TorchStepper, decoder_stepper, step_each
from lfmc.targets.base import Artifact
from lfmc.verification.float_twin import float_rungs

WINDOW = 256
WINDOWS = {"full": 7, "fast": 2}
BYTES_PER_PARAM = 10  # two float32 models side by side, and the codes of a third

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
        allowed = math.inf if rung.tolerance is None else rung.tolerance
        raise GateError(
            f"parity rung {rung.number} failed: {rung.title}",
            where=worst.case if place is None else f"{place.where}; {worst.case}",
            expected=f"a difference of at most {allowed:g}",
            got=f"{worst.difference:.3g}",
            todo=TRACE if place is None else REPORT,
        ).at(place)


def verify(
    made: Build,
    folder: Path,
    artifact: Artifact,
    check: str,
    text: Path | None,
    progress: Progress,
) -> Verification:
    """Climb all four rungs for the artifact in `folder`; `check` is "full" or "fast". Rung 4 is
    on the text of a file, or for None on the bundled passages.

    Where this machine can't execute the artifact, rungs 3 and 4 are skipped with the reason.
    """
    checkpoint, context = made.checkpoint, made.asked.context
    matrix = cases(checkpoint.config, context, full=check == "full")
    rungs = []
    with progress.stage("parity 1: decoder against transformers"):
        rungs.append(_decoder_rung(checkpoint, matrix, context, progress))
    made.bind()
    with progress.stage("parity 2: graph against decoder"):
        rungs.append(_graph_rung(made, matrix, progress))
    why_not_here = made.target.why_not_here(made.asked)
    if why_not_here is not None:
        rungs += [skipped(number, TITLES[number], why_not_here) for number in (3, 4)]
        return Verification(tuple(rungs), None)
    with progress.stage("parity 3: artifact against torch"):
        rungs += artifact_rungs(made, folder, artifact, matrix, progress)
        rungs += float_rungs(made, matrix, progress)
    with progress.stage("parity 4: quality on text"):
        judged = passages(checkpoint, min(WINDOW, context), WINDOWS[check], text)
        quality = measure_quality(checkpoint, made.target.run(folder), judged, progress)
    return Verification(tuple(rungs), quality)


def require_parity_memory(checkpoint: Checkpoint, todo: str) -> None:
    """Raise `UnsupportedError` where this machine has less memory than the rungs take."""
    needed = BYTES_PER_PARAM * checkpoint.num_params
    require_memory(checkpoint.path, checkpoint.num_params, needed, "parity", todo)


def _decoder_rung(
    checkpoint: Checkpoint, matrix: tuple[Case, ...], context: int, progress: Progress
) -> Rung:
    if not is_available():
        return skipped(1, TITLES[1], "transformers is not installed: pip install 'lfmc[reference]'")
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


def _graph_rung(made: Build, matrix: tuple[Case, ...], progress: Progress) -> Rung:
    checkpoint, context = made.checkpoint, made.asked.context
    return compare(
        2,
        TITLES[2],
        TorchStepper(made.program.module, checkpoint.config, context),
        decoder_stepper(made.weights.decoder(), context),
        matrix,
        checkpoint.config.vocab_size,
        tolerance=FLOAT_TOLERANCE,
        progress=progress.step,
    )


def artifact_rungs(
    made: Build, folder: Path, artifact: Artifact, matrix: tuple[Case, ...], progress: Progress
) -> list[Rung]:
    """The artifact with float activations, each n-bit operator alone, and all as it ships."""
    rungs = [*made.target.operator_parity(made.program, folder, artifact)]
    for exact in (True, False) if made.target.exact else (False,):
        title = UNGATED[exact] if made.tolerance(exact=exact) is None else TITLES[3]
        near_tie = NEAR_TIE if exact else NEAR_TIE_SHIPPED
        rungs.append(made.compare(title, folder, matrix, progress, exact=exact, near_tie=near_tie))
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
