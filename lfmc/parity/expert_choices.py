"""Finds where two models choose other experts.

Rounding can change the choice between two experts whose scores are nearly equal. From that token
on, the states contain the result of another expert, so all logits differ. Parity compares these
tokens separately. A choice that changes without a near tie is an error.
"""

from __future__ import annotations

from lfmc.run.expert_choice import ExpertChoice

# Largest difference of two experts' scores at which the choice between them may change: for float32
# arithmetic in a different order, and for activations rounded to float16 or int8.
NEAR_TIE = 1e-5
NEAR_TIE_SHIPPED = 2e-3


def find_changed_choice(actual: ExpertChoice, reference: ExpertChoice) -> tuple[int, float] | None:
    """Return the first token whose experts differ from `reference`, and the margin of that choice.

    The margin is that of `reference` in the first layer that differs. Returns None if no choice
    differs.
    """
    differs = (actual.experts != reference.experts).any(-1)  # (L, T)
    changed_tokens = differs.any(0).nonzero()
    if not len(changed_tokens):
        return None
    token = int(changed_tokens[0])
    layer = int(differs[:, token].nonzero()[0])
    margins = reference.margins
    return token, float("inf") if margins is None else float(margins[layer, token])
