"""Error of an artifact that rounds activations, relative to the expected rounding noise.

The reference is torch with the same rounding of activations. Two correct implementations of the
same rounding drift apart: a float difference of 1e-7 moves about one value in ten thousand to the
next rounding step, and later values then differ as well. The difference between the two logits
grows to about the difference between rounded and float activations, which is the rounding noise.
A wrong scale or weight causes a larger difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.run.conversation import Conversation, ConversationModel, SteppedModel
from lfmc.run.stepper import Stepper

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
    program: Program, rounded: ConversationModel, artifact_stepper: Stepper, limit: float = LIMIT
) -> Rung:
    """Compare the artifact with rounded torch on random tokens, in units of the rounding noise.

    `program` is bound to its weights. `rounded` is the bound program with activations rounded as in
    the artifact. One case is the first tokens of many conversations: in some of them no value is
    near a rounding boundary, and a correct artifact differs by about 1e-5. The other case is one
    long conversation.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(program.config.vocab_size, (CONVERSATIONS,), generator=generator)
    conversations = [
        *(Conversation((token.view(1),)) for token in tokens),
        _decode(tokens[: artifact_stepper.context], CONVERSATIONS // 2),
    ]
    models = (
        SteppedModel(artifact_stepper),
        rounded,
        LayerwiseProgram(program, artifact_stepper.context),
    )
    first, long = zip(*(_logits(model, conversations) for model in models), strict=True)
    return Rung(3, TITLE, limit, (_case(FIRST, 0.25, *first), _case(LONG, 0.5, *long)))


def _decode(tokens: Tensor, prefill: int) -> Conversation:
    """Return a conversation with a prefill and one call for each following token."""
    return Conversation((tokens[:prefill], *tokens[prefill:].split(1)))


def _logits(
    model: ConversationModel, conversations: Sequence[Conversation]
) -> tuple[Tensor, Tensor]:
    """Return logits of the first tokens `[N, V]`, and of each call of the last conversation."""
    *first, long = model.run(conversations)
    ends = torch.tensor(conversations[-1].ends)
    rows = slice(None) if model.last_only else ends - 1
    return torch.cat([reply.logits for reply in first]), long.logits[rows]


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
