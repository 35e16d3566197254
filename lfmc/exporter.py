"""The pipeline from a checkpoint to a verified bundle, one step after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lfmc
from lfmc.bundle import GOLDEN, MANIFEST, PLAN, Bundle, describe, open_bundle, write_json, writing
from lfmc.cache import NOTHING, default_cache
from lfmc.calib_free.allocate import FAST, Budget, Effort, make_plan
from lfmc.calib_free.alphaq import AlphaQOptions
from lfmc.calib_free.auto import Allocation
from lfmc.calib_free.formats import Format, parse_format
from lfmc.calib_free.plan import BitPlan
from lfmc.calib_free.resources import Resources
from lfmc.chat import chat_prompt, copy_tokenizer
from lfmc.checkpoint import Checkpoint
from lfmc.errors import GateError, InputError
from lfmc.generate import golden_prompts
from lfmc.locate.bisect import Suspect
from lfmc.locate.search import find_place
from lfmc.memory import require_memory
from lfmc.passes.base import Applied, apply
from lfmc.passes.pipeline import pipeline
from lfmc.program import Program
from lfmc.progress import Progress
from lfmc.readback import read_back
from lfmc.rungs import CHECKS, PARITY_BYTES_PER_PARAM, Verification, verify
from lfmc.stepping import Stepper, TorchStepper
from lfmc.targets.base import Artifact, Request, Target, choose_options
from lfmc.timing import require_speed
from lfmc.tokens import check_tokens, special_tokens
from lfmc.trace import trace
from lfmc.versions import tool_versions
from lfmc.weights import PlannedWeights
from lfmc.workers import open_workers

DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 16  # the golden prompts and a few tokens


@dataclass(frozen=True)
class Options:
    """What a user asks of an export.

    `bits` None is "auto"; `plan` excludes `bits`, `budget` and `alphaq`, the knobs of "alphaq".
    `target_options` are choices for `Target.options`, by name. `text` is a file to judge on, in
    place of the passages that ship with lfmc; `min_speed` is in decoded tokens a second, here.
    With `trace` a rung that fails is traced to the first place that differs.
    `workers` (`dask://HOST:PORT`) measure for a new plan, this machine for None; with `cache`,
    what was measured before is used, and kept for the next plan. Neither changes a plan.
    """

    bits: str | None = None
    budget: Budget | None = None
    plan: Path | None = None
    context: int | None = None
    target_options: Mapping[str, str] = field(default_factory=dict)
    check: str = "full"
    trace: bool = False
    max_kl: float | None = None
    min_top1: float | None = None
    min_speed: float | None = None
    text: Path | None = None
    seed: int = 0
    effort: Effort = FAST
    alphaq: AlphaQOptions | None = None
    workers: str | None = None
    cache: bool = True


@dataclass(frozen=True)
class Report:
    """What an export did, for the table at its end and for `--json`."""

    plan: BitPlan
    applied: tuple[Applied, ...]
    verification: Verification | None
    errors: Mapping[str, float]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        checked = self.verification
        return {
            "bits_per_weight": self.plan.bits_per_weight,
            "plan_nbytes": self.plan.nbytes,
            "artifact_nbytes": self.nbytes,
            "limit_nbytes": self.plan.limit_nbytes,
            "passes": {step.name: step.changed for step in self.applied},
            "parity": [rung.to_dict() for rung in checked.rungs] if checked else None,
            "quality": asdict(checked.quality) if checked and checked.quality else None,
            "measured_errors": dict(self.errors),
        }


def request(checkpoint: Checkpoint, target: Target, options: Options) -> Request:
    """Context and options of an export; all of it is checked before any work is done."""
    _check_options(options)
    longest = checkpoint.config.max_context
    context = min(DEFAULT_CONTEXT, longest) if options.context is None else options.context
    if not min(MIN_CONTEXT, longest) <= context <= longest:
        raise InputError(
            "the context is outside of what the model was made for",
            expected=f"{min(MIN_CONTEXT, longest)} to {longest} tokens",
            got=context,
        )
    asked = Request(context, choose_options(target, options.target_options))
    target.check(checkpoint.config, asked)
    return asked


def plan_for(
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    progress: Progress,
    observe: Callable[[Allocation], None] = lambda made: None,
) -> BitPlan:
    """The plan of a file, checked, or a new one made for the target's capabilities.

    `observe` is given what a new plan by "auto" measured.
    """
    capabilities = target.capabilities(checkpoint.config)
    if options.plan is None:
        cache = default_cache() if options.cache else NOTHING
        with progress.stage("plan"), open_workers(options.workers) as workers:
            return make_plan(
                checkpoint,
                capabilities,
                options.bits or "auto",
                options.budget,
                target=target.name,
                seed=options.seed,
                effort=options.effort,
                alphaq=options.alphaq,
                progress=progress.step,
                observe=observe,
                resources=Resources(workers, cache),
            )
    plan = BitPlan.load(options.plan)
    plan.check(checkpoint, capabilities)
    return plan


def export(
    checkpoint: Checkpoint,
    target: Target,
    output: Path,
    options: Options,
    *,
    force: bool,
    progress: Progress,
) -> tuple[Bundle, Report]:
    """Plan, trace, fuse, lower, verify and write `output`; nothing is left there on failure.

    Raises `InputError` and `UnsupportedError` before any work where the request can't be met, and
    `GateError` where parity, the budget, `max_kl` or `min_top1` is not.
    """
    asked = request(checkpoint, target, options)
    why_not_here = target.why_not_here(asked)
    _check_executed(options, why_not_here)
    each = target.lowering_bytes * (2 if options.bits == "none" else 1)  # floats take twice
    needed = int(each * checkpoint.num_params)
    require_memory(checkpoint, needed, "lowering", "export it on a machine with more memory")
    if options.check != "off":
        needed = PARITY_BYTES_PER_PARAM * checkpoint.num_params
        require_memory(checkpoint, needed, "parity", "--check off leaves it out")
    with writing(output, force=force) as folder:
        extra_files = copy_tokenizer(checkpoint, folder)
        plan = plan_for(checkpoint, target, options, progress)
        weights = PlannedWeights(checkpoint, plan)
        program, applied = build_program(checkpoint, target, plan, asked, progress)
        with progress.stage("lower"):
            artifact = target.lower(program, weights, asked, folder)
        nbytes = sum((folder / name).stat().st_size for name in artifact.files)
        _check_size(plan, artifact, nbytes)
        stored = sum(tensor.nbytes for tensor in artifact.tensors)
        plan = replace(plan, graph_nbytes=nbytes - stored)
        verification, errors = None, {}
        if options.check != "off":
            with progress.stage("read the file back"):
                errors = read_back(weights, target, folder, artifact)
            verification = verify(
                checkpoint,
                weights,
                program,
                target,
                folder,
                artifact,
                asked,
                options.check,
                progress,
                why_not_here,
                options.text,
            )
            place = None
            if options.trace:
                place = find_place(
                    Suspect(checkpoint, weights, program, target, asked), verification, progress
                )
            verification.require(place)
            _check_quality(verification, options)
            if options.min_speed is not None:
                with progress.stage("time"):
                    require_speed(target.run(folder), options.min_speed)
        report = Report(plan, tuple(applied), verification, errors, nbytes)
        stepper: Stepper
        if why_not_here is None:
            stepper = target.run(folder)
        else:
            program.bind(weights.value)
            reference = target.reference(program, asked, folder, exact=False)
            stepper = TorchStepper(reference, checkpoint.config, asked.context)
        golden = golden_prompts(stepper, checkpoint.tokenizer(), checkpoint.config.bos_id)
        write_json(folder / GOLDEN, golden)
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        extra_files += [GOLDEN, PLAN, *artifact.beside]
        manifest = _manifest(
            checkpoint,
            target,
            asked,
            artifact,
            report,
            folder,
            extra_files,
            options,
            why_not_here,
        )
        write_json(folder / MANIFEST, manifest)
        check_tokens(open_bundle(folder), checkpoint)
    return open_bundle(output), report


def _check_options(options: Options) -> None:
    """Raise `InputError` for options that contradict each other or that could not be met."""
    if options.check not in CHECKS:
        raise InputError("there is no such check", expected=", ".join(CHECKS), got=options.check)
    gates = {
        "--max-kl": (options.max_kl, math.inf),
        "--min-top1": (options.min_top1, 1.0),
        "--min-speed": (options.min_speed, math.inf),
    }
    for name, (value, highest) in gates.items():
        if value is None:
            continue
        if not 0 <= value <= highest:
            raise InputError(f"{name} is out of range", expected=f"0 to {highest:g}", got=value)
        if options.check == "off":
            raise InputError(f"{name} needs a measurement, and --check off makes none")
    effort = None if options.effort == FAST else options.effort
    if options.text is not None and not options.text.is_file():
        raise InputError("there is no text to judge on", where=options.text, expected="a file")
    decided = (options.budget, options.bits, options.alphaq, effort)
    if options.plan is not None and any(part is not None for part in decided):
        raise InputError(
            "a plan already says what every tensor takes",
            where=options.plan,
            todo="leave out --bits, --bits-per-weight, --max-size, --effort and --alphaq-...",
        )


def build_program(
    checkpoint: Checkpoint, target: Target, plan: BitPlan, asked: Request, progress: Progress
) -> tuple[Program, list[Applied]]:
    """Trace the decoder as the target wants it, and run the passes."""
    with progress.stage("trace"):
        program = trace(checkpoint.config, target.trace_spec(checkpoint.config, asked))
    with progress.stage("passes"):
        formats = {row.name: parse_format(row.format) for row in plan.rows}
        applied = apply(pipeline(formats), program)
    _check_coverage(plan, program)
    return program, applied


def _check_coverage(plan: BitPlan, program: Program) -> None:
    """Every tensor that the plan quantizes is quantized in the graph, and no other."""
    planned = {row.name for row in plan.rows if isinstance(parse_format(row.format), Format)}
    found = {s for w in program.weights.values() if w.part == "codes" for s in w.sources}
    if planned != found:
        raise GateError(
            "the graph and the plan disagree about what is quantized",
            where=", ".join(sorted(planned ^ found)[:4]),
            expected=f"{len(planned)} tensors",
            got=f"{len(found)}",
            todo="this is a fault of lfmc; please report it",
        )


def _check_executed(options: Options, why_not_here: str | None) -> None:
    """Raise `InputError` for gates that only an execution can open."""
    gates = {
        "--max-kl": options.max_kl,
        "--min-top1": options.min_top1,
        "--min-speed": options.min_speed,
    }
    for name, value in gates.items():
        if why_not_here is not None and value is not None:
            raise InputError(
                f"{name} needs the artifact to be executed, and this machine can't",
                got=why_not_here,
            )


def _check_size(plan: BitPlan, artifact: Artifact, nbytes: int) -> None:
    """The file holds what the plan says, and no more than the budget.

    A plan pads rows of codes and zero points to whole bytes. A target does so, too, or does without
    in all of its tensors; then a stack of several may save a part of a byte of each.
    """
    stored = sum(tensor.nbytes for tensor in artifact.tensors)
    planned = sum(row.nbytes for row in plan.rows)
    formats = ((parse_format(row.format), row.shape) for row in plan.rows)
    dense = planned - sum(f.padding(shape) for f, shape in formats if isinstance(f, Format))
    if stored != planned and not dense - len(plan.rows) <= stored <= dense:
        raise GateError(
            "the artifact does not hold the bytes that were planned",
            expected=f"{planned} bytes of tensors",
            got=f"{stored} bytes",
            todo="this is a fault of lfmc; please report it",
        )
    if plan.limit_nbytes is not None and nbytes > plan.limit_nbytes:
        raise GateError(
            "the artifact is larger than its budget",
            expected=f"at most {plan.limit_nbytes} bytes",
            got=f"{nbytes} bytes",
            todo="lfmc keeps too little room for the graph; please report it",
        )


def _check_quality(verification: Verification, options: Options) -> None:
    quality = verification.quality
    if quality is None:
        return
    if options.max_kl is not None and not quality.kl <= options.max_kl:
        raise GateError(
            "quantization changed the model more than allowed",
            expected=f"KL of at most {options.max_kl:g} nats per token (--max-kl)",
            got=f"{quality.kl:.4f}",
            todo="raise the budget, or the limit",
        )
    if options.min_top1 is not None and not quality.top1 >= options.min_top1:
        raise GateError(
            "the most likely token changed more often than allowed",
            expected=f"top-1 agreement of at least {options.min_top1:g} (--min-top1)",
            got=f"{quality.top1:.4f}",
            todo="raise the budget, or lower the limit",
        )


def _manifest(
    checkpoint: Checkpoint,
    target: Target,
    asked: Request,
    artifact: Artifact,
    report: Report,
    folder: Path,
    extra_files: list[str],
    options: Options,
    why_not_here: str | None,
) -> dict[str, Any]:
    """Everything an app, or a person, needs to know of the bundle."""
    config = checkpoint.config
    return {
        "lfmc": lfmc.__version__,
        "target": target.name,
        "options": dict(asked.options),
        "context": asked.context,
        "check": options.check,
        "judged_on": None if options.text is None else describe(options.text),  # None: passages
        "not_executed": why_not_here,
        "model": {
            "name": checkpoint.name,
            "type": config.model_type,
            "fingerprint": checkpoint.fingerprint,
            "parameters": checkpoint.num_params,
            "vocab_size": config.vocab_size,
        },
        "tokens": special_tokens(checkpoint),
        "chat_prompt": chat_prompt(checkpoint, folder),
        # States can't be rewound: drop the last tokens by a reset and a new prefill.
        "can_rewind": False,
        "artifact": list(artifact.files),
        "files": {name: describe(folder / name) for name in (*artifact.files, *extra_files)},
        **artifact.facts,
        "report": report.to_dict(),
        "tensors": [asdict(tensor) for tensor in artifact.tensors],
        "probes": [asdict(probe) for probe in artifact.probes],
        "versions": tool_versions(),
    }
