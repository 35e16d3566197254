"""The Python API: the functions behind the commands. Every public name is also in `lfmc`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lfmc.bundle.bundle import Bundle, open_bundle
from lfmc.bundle.prompt import encode_prompt, stream_text, uses_template
from lfmc.calib_free.allocate.budget import Budget
from lfmc.calib_free.alphaq import AlphaQOptions
from lfmc.calib_free.make_plan import FAST, Effort
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.checkpoint.tokenizer import open_tokenizer
from lfmc.errors import GateError, InputError, LfmcError, UnsupportedError
from lfmc.machine.progress import Silent
from lfmc.run.generate import continue_tokens
from lfmc.run.sampling import choose_sampling
from lfmc.run.stepper import Stepper
from lfmc.targets.base import Target, get_target

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "AlphaQOptions",
    "BitPlan",
    "Bundle",
    "Checkpoint",
    "Effort",
    "GateError",
    "InputError",
    "LfmcError",
    "PlanRow",
    "Stepper",
    "UnsupportedError",
    "export",
    "generate",
    "load",
    "load_tokenizer",
    "open_bundle",
    "open_checkpoint",
    "plan",
    "verify",
]


def budget(bits_per_weight: float | None, max_size: int | None) -> Budget | None:
    """Return the budget, or None if neither limit is set."""
    if bits_per_weight is None and max_size is None:
        return None
    return Budget(bits_per_weight, max_size)


def default_output(checkpoint: Checkpoint, target: Target) -> Path:
    """Return `NAME-TARGET` in the current folder."""
    return Path(f"{checkpoint.name}-{target.name}")


def plan(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    target: str = "onnx",
    bits: str | None = None,
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    target_options: Mapping[str, str] | None = None,
    seed: int = 0,
    effort: Effort = FAST,
    alphaq: AlphaQOptions | None = None,
    workers: str | None = None,
    cache: bool = True,
) -> BitPlan:
    """Choose a number format for every tensor of a checkpoint. Write nothing.

    Args:
        model: A checkpoint folder or a hub id. None uses the small checkpoint in the package.
        adapter: A LoRA adapter of the model to merge: a folder or a hub id.
        target: The target whose formats the plan may use.
        bits: "auto" (the default), "alphaq", "uniform", "none", or one bit width such as "4".
        bits_per_weight: Budget: all stored bits over all parameters.
        max_size: Budget in bytes of the exported files.
        target_options: Options of the target on which its formats depend.
        seed: Random seed for text the model generates while planning.
        effort: `Effort("best", minutes=10)` also fine-tunes codes, scales and norms.
        alphaq: Options of the method "alphaq".
        workers: `dask://HOST:PORT` of a cluster that measures.
        cache: Read and write cached measurements.

    Raises:
        InputError: The checkpoint or an argument is wrong, or nothing fits the budget.
        UnsupportedError: The target can't store this model, or a package is missing.
    """
    from lfmc.exporter.budget import plan_for
    from lfmc.lowering.request import Options

    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        target_options=target_options or {},
        seed=seed,
        effort=effort,
        alphaq=alphaq,
        workers=workers,
        cache=cache,
    )
    return plan_for(open_checkpoint(model, adapter), get_target(target), options, Silent())


def export(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    target: str = "onnx",
    output: str | Path | None = None,
    force: bool = False,
    bits: str | None = None,
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    plan: str | Path | None = None,
    context: int | None = None,
    target_options: Mapping[str, str] | None = None,
    check: Literal["full", "fast", "off"] = "full",
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_speed: float | None = None,
    trace: bool = False,
    text: str | Path | None = None,
    seed: int = 0,
    effort: Effort = FAST,
    alphaq: AlphaQOptions | None = None,
    workers: str | None = None,
    cache: bool = True,
) -> Bundle:
    """Quantize a checkpoint, lower it for a target, verify the result, and write a bundle.

    Args:
        model: A checkpoint folder or a hub id. None uses the small checkpoint in the package.
        adapter: As in `plan`.
        target: "coreml", "ethos-u", "executorch", "mlir", "onnx", "qualcomm" or "tvm".
        output: The folder to write. None writes `NAME-TARGET` in the current folder.
        force: Replace a bundle that exists.
        bits: As in `plan`.
        bits_per_weight: As in `plan`.
        max_size: As in `plan`.
        plan: A `plan.json` to use instead of planning.
        context: The longest conversation, in tokens. None means 4096, or the model's maximum if
            that is smaller.
        target_options: Options of the target, as in `-O NAME=VALUE` (`lfmc doctor` lists them).
        check: "full" runs the whole parity matrix, "fast" two cases, "off" none.
        max_kl: Fail above this KL divergence, in nats per token.
        min_top1: Fail below this top-1 agreement, 0 to 1.
        min_speed: Fail below this decode speed on this machine, in tokens per second.
        trace: If a parity rung fails, find the first operator that differs.
        text: A UTF-8 text file for rung 4. None uses the passages in the package.
        seed: As in `plan`.
        effort: As in `plan`.
        alphaq: As in `plan`.
        workers: As in `plan`.
        cache: As in `plan`.

    Raises:
        InputError: The checkpoint or an argument is wrong.
        GateError: Parity, the budget or a limit (`max_kl`, ...) is not met. Nothing is written.
        UnsupportedError: The target can't export this model, or a package is missing.
    """
    from lfmc.exporter.export import export as export_bundle
    from lfmc.lowering.request import Options

    checkpoint, chosen_target = open_checkpoint(model, adapter), get_target(target)
    folder = default_output(checkpoint, chosen_target) if output is None else Path(output)
    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        plan=None if plan is None else Path(plan),
        context=context,
        target_options=dict(target_options or {}),
        check=check,
        trace=trace,
        max_kl=max_kl,
        min_top1=min_top1,
        min_speed=min_speed,
        text=None if text is None else Path(text),
        seed=seed,
        effort=effort,
        alphaq=alphaq,
        workers=workers,
        cache=cache,
    )
    bundle, _ = export_bundle(
        checkpoint, chosen_target, folder, options, force=force, progress=Silent()
    )
    return bundle


def verify(
    bundle: Bundle | str | Path,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Check the files and golden prompts of a bundle. With its checkpoint, run all parity rungs.

    `adapter` is the LoRA adapter that was merged into the checkpoint. Returns the numbers of files
    and golden prompts, and with `model` the parity and quality numbers. Raises `GateError` for the
    first check that fails.
    """
    from lfmc.exporter.reverify import reverify

    checkpoint = None if model is None else open_checkpoint(model, adapter)
    return reverify(_opened(bundle), checkpoint, Silent())


def load(bundle: Bundle | str | Path) -> Stepper:
    """Load the model of a bundle, of any target.

    The result has two methods: `step(tokens)` returns float32 logits `[T, V]` and keeps the state
    for the next call; `reset()` starts a new conversation.
    """
    opened = _opened(bundle)
    stepper = get_target(opened.target).run(opened.path)
    if stepper.context != opened.manifest["context"]:
        raise InputError(
            "the model and the manifest disagree about the context",
            where=opened.path,
            expected=opened.manifest["context"],
            got=stepper.context,
        )
    return stepper


def load_tokenizer(bundle: Bundle | str | Path) -> Tokenizer:
    """Load the tokenizer of a bundle, a `tokenizers.Tokenizer`.

    `encode(text, add_special_tokens=False).ids` are the ids of a text. Most models expect their
    start token in front: `bundle.manifest["tokens"]["bos"]`. `lfmc.generate` adds it.
    """
    return open_tokenizer(_opened(bundle).path)


def generate(
    bundle: Bundle | str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    raw: bool = False,
    chat: bool = False,
    system: str | None = None,
    model: Stepper | None = None,
) -> Iterator[str]:
    """Answer a prompt, and yield the new text piece by piece: `"".join(...)` is all of it.

    If the bundle has a chat template, the prompt is the user's message in it. Otherwise, and with
    `raw`, the prompt is plain text that the model continues.

    A sampling setting that is None is the one that the bundle recommends (`sampling` of its
    manifest). A bundle that recommends none is greedy. Each setting means what it means in
    transformers.

    Args:
        bundle: A bundle of any target that runs on this machine.
        prompt: The user's message, or the text to continue.
        max_tokens: The longest continuation, in tokens. It also ends when the context is full.
        temperature: 0 picks the most likely token; above 0, tokens are sampled.
        top_k: Sample from this many of the most likely tokens.
        top_p: Sample from the most likely tokens that together have this probability.
        min_p: Sample from tokens that are at least this many times as likely as the most likely.
        repetition_penalty: Above 1, tokens of the conversation become less likely.
        seed: Random seed for sampling.
        raw: Continue the prompt as plain text, without the chat template.
        chat: Require a chat template.
        system: A system message, which comes before the prompt in the chat template.
        model: The result of `lfmc.load(bundle)`, to load it once for several prompts.

    Raises:
        InputError: At once, for a prompt without tokens, a missing chat template, or a number
            that is out of range.
    """
    if max_tokens < 1:
        raise InputError("max_tokens must be at least 1", got=max_tokens)
    opened = _opened(bundle)
    sampling = choose_sampling(
        opened.manifest.get("sampling"),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    template = uses_template(opened, raw=raw, chat=chat, system=system)
    tokenizer = open_tokenizer(opened.path)
    prompt_ids = encode_prompt(opened, tokenizer, prompt, template=template, system=system)
    stepper = load(opened) if model is None else model
    stop_ids = opened.manifest["tokens"]["stop"]
    tokens = continue_tokens(
        stepper, prompt_ids, max_tokens, stop_ids, sampling=sampling, seed=seed
    )
    return stream_text(tokenizer, tokens)


def _opened(bundle: Bundle | str | Path) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
