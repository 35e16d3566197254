"""Error of an artifact that rounds activations, relative to the expected rounding noise.

The reference is torch with the same rounding of activations. Two correct implementations of the
same rounding drift apart: a float difference of 1e-7 moves about one value in ten thousand to the
next rounding step, and later values then differ as well. The difference between the two logits
grows to about the difference between rounded and float activations, which is the rounding noise.
A wrong scale or weight causes a larger difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.run.stepper import Stepper, TorchStepper

TITLE = "artifact = torch: error relative to expected rounding noise"
CONVERSATIONS = 24
FIRST, LONG = "first tokens, lower quartile", "prefill and decode, median"
# Two independent roundings differ by sqrt(2) times the rounding noise.
LIMIT = 2.0


def has_nbit_products(program: Program) -> bool:
    """Return whether any product has an n-bit weight; only such products round their input."""
    names = ("lfm.linear_nbits", "lfm.dequantize")
    return any(True for name in names for _ in program.nodes(name))


def noise_rung(
    program: Program, rounded_module: nn.Module, artifact_stepper: Stepper, limit: float = LIMIT
) -> Rung:
    """Compare the artifact with rounded torch on random tokens, in units of the rounding noise.

    `program` is bound to its weights. `rounded_module` is the bound program with activations
    rounded as in the artifact. One case is the first tokens of many conversations: in some of
    them no value is near a rounding boundary, and a correct artifact differs by about 1e-5. The
    other case is one long conversation.
    """
    rounded_stepper, float_stepper = (
        TorchStepper(module, program.config, artifact_stepper.context)
        for module in (rounded_module, program.module)
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(program.config.vocab_size, (CONVERSATIONS, 1), generator=generator)
    steppers = (artifact_stepper, rounded_stepper, float_stepper)
    first = _case(FIRST, 0.25, *(torch.cat([_run(s, token) for token in tokens]) for s in steppers))
    long = _case(LONG, 0.5, *(_run(s, tokens.flatten(), CONVERSATIONS // 2) for s in steppers))
    return Rung(3, TITLE, limit, (first, long))


def _run(stepper: Stepper, tokens: Tensor, prefill: int = 1) -> Tensor:
    """Return the logits after a prefill of `prefill` tokens and after each decoded token."""
    stepper.reset()
    tokens = tokens[: stepper.context]
    pieces = [tokens[:prefill], *(token.view(1) for token in tokens[prefill:])]
    return torch.cat([stepper.step(piece)[-1:] for piece in pieces])


def _case(
    name: str, quantile: float, artifact: Tensor, rounded: Tensor, unrounded: Tensor
) -> CaseResult:
    """Compare logits `[T, V]` of the artifact, of rounded torch and of float torch."""
    error, noise = _rms(artifact - rounded), _rms(rounded - unrounded)
    ratio = float(error.quantile(quantile) / noise.median())
    top1_agreement = float((artifact.argmax(-1) == rounded.argmax(-1)).float().mean())
    return CaseResult(name, ratio, top1_agreement)


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square per token of `[T, V]`; infinity if a value is not finite."""
    return values.square().mean(-1).sqrt().nan_to_num(torch.inf)
