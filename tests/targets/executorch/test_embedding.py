"""A tied embedding: its lookup and its product read the same bytes of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.make_plan import Budget
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.exporter.export import export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.run.conversation import Conversation, SteppedModel
from lfmc.targets.base import get_target
from lfmc.targets.executorch.steps import byte_view
from lfmc.targets.executorch.stored import MODEL
from tests.factories import random_tokens
from tests.targets.executorch.programs import floats, four_bit, mixed
from tests.targets.lowering import Choose, Lowered

NAME = "model.embed_tokens.weight"


@pytest.mark.parametrize("choose", [floats, four_bit, mixed])
def test_a_tied_embedding_is_stored_once(lowered: Callable[..., Lowered], choose: Choose) -> None:
    build = lowered("lfm2", choose, "executorch")
    weights = build.weights
    if choose is floats:
        parts = [weights.floats((NAME,))]
    else:
        packed = weights.packed((NAME,))
        codes = packed.packed_codes() if choose is four_bit else packed.signed_codes()
        parts = [codes, packed.scales]
    data = (build.folder / MODEL).read_bytes()
    assert [data.count(byte_view(part)) for part in parts] == [1] * len(parts)
    stored = [tensor for tensor in build.artifact.tensors if tensor.sources == (NAME,)]
    assert [tensor.nbytes for tensor in stored] == [len(byte_view(part)) for part in parts]


def test_lookup_of_4_bits_is_exact(lowered: Callable[..., Lowered]) -> None:
    """Each token alone, because too few activations are rounded then for a different rounding."""
    build = lowered("lfm2", four_bit, "executorch")
    config = build.checkpoint.config
    program = build.target.run(build.folder)
    conversations = [Conversation((token,)) for token in random_tokens(config, 1, 8)[0].split(1)]
    expected = build.reference(exact=False).run(conversations)
    for actual, reply in zip(SteppedModel(program).run(conversations), expected, strict=True):
        torch.testing.assert_close(actual.logits, reply.logits, rtol=0, atol=1e-4)


def test_a_small_model_fits_4_5_bits_per_weight(tmp_path: Path) -> None:
    options = Options(bits="uniform", budget=Budget(4.5), check="off", context=256)
    _, report = export(
        open_checkpoint(),
        get_target("executorch"),
        tmp_path / "bundle",
        options,
        force=False,
        progress=Silent(),
    )
    assert report.nbytes * 8 <= 4.5 * open_checkpoint().num_params
