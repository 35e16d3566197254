"""The program against torch that rounds activations alike, in units of what that rounding does.

Two correct implementations of the same rounding drift apart: a float difference of 1e-7 turns one
value in some ten thousands to the next step, and from there on the two round differently. They end
as far apart as rounding takes either from float activations, and no further; a wrong scale or
weight does not stop there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.run.stepper import Stepper, TorchStepper

TITLE = "artifact = torch that rounds alike, over what rounding does"
CONVERSATIONS = 24
FIRST, LONG = "first tokens, lower quartile", "prefill and decode, median"
# Two independent roundings are sqrt(2) apart.
LIMIT = 2.0


def n_bit(program: Program) -> bool:
    """Whether any product of the program rounds its input."""
    names = ("lfm.linear_nbits", "lfm.dequantize")
    return any(True for name in names for _ in program.nodes(name))


def noise_rung(program: Program, rounding: nn.Module, side: Stepper, limit: float = LIMIT) -> Rung:
    """Ratios of `side`, which runs the artifact, for random tokens; `program` is bound, `rounding`
    is the same with activations rounded alike. For first tokens of conversations, some of which
    meet no rounding that turns (there it is about 1e-5, where all is right), and for a long one."""
    alike, plain = (
        TorchStepper(module, program.config, side.context) for module in (rounding, program.module)
    )
    generator = torch.Generator().manual_seed(0)
    firsts = torch.randint(program.config.vocab_size, (CONVERSATIONS, 1), generator=generator)
    sides = (side, alike, plain)
    ours, rounded, floats = (torch.cat([_run(s, token) for token in firsts]) for s in sides)
    first = _case(FIRST, 0.25, ours, rounded, floats)
    ours, rounded, floats = (_run(s, firsts.flatten(), CONVERSATIONS // 2) for s in sides)
    return Rung(3, TITLE, limit, (first, _case(LONG, 0.5, ours, rounded, floats)))


def _run(side: Stepper, tokens: Tensor, prefill: int = 1) -> Tensor:
    """Logits of a conversation: of the last of some tokens at once, then of others one by one."""
    side.reset()
    kept = tokens[: side.context]
    pieces = [kept[:prefill], *(token.view(1) for token in kept[prefill:])]
    return torch.cat([side.step(piece)[-1:] for piece in pieces])


def _case(name: str, quantile: float, ours: Tensor, rounded: Tensor, floats: Tensor) -> CaseResult:
    apart, noise = _rms(ours - rounded), _rms(rounded - floats)
    ratio = float(apart.quantile(quantile) / noise.median())
    return CaseResult(name, ratio, float((ours.argmax(-1) == rounded.argmax(-1)).float().mean()))


def _rms(values: Tensor) -> Tensor:
    """Of each token `[T, V]`; infinite where something is not finite."""
    return values.square().mean(-1).sqrt().nan_to_num(torch.inf)
