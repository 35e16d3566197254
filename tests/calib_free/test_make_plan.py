from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.alphaq import method as alphaq
from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.auto import method as auto
from lfmc.calib_free.auto.method import Sample
from lfmc.calib_free.fit import fit
from lfmc.calib_free.fit.fit import Effort, FitRecipe
from lfmc.calib_free.fit.training_loop import TrainingSchedule
from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Format, parse_format
from lfmc.calib_free.make_plan import METHODS, Budget, make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.roles import QUANTIZED_ROLES
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, LfmcError, UnsupportedError
from lfmc.machine.cache import NO_CACHE, UNFINISHED, Cache
from tests.calib_free.conftest import MakeCheckpoint

LINEAR = tuple(
    Format(b, g, s, "float16") for b in (2, 4, 8) for g in (32, 64) for s in (True, False)
)
PHONE = Capabilities(
    linear=LINEAR,
    embedding=(Format(8, 32, True, "float16"), Format(4, 32, True, "float16")),
    expert=tuple(Format(b, g, False, "float16") for b in (2, 4, 8) for g in (32, 64, 128)),
    floats=("float32", "float16"),
    merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
    expert_unit="expert",
    expert_layer_shares_group=True,
    graph_nbytes=6000,
)


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "TEXTS", 2)
    monkeypatch.setattr(auto, "LENGTH", 16)
    monkeypatch.setattr(auto, "ROWS", 4)


@pytest.mark.parametrize("capabilities", [GENERIC, PHONE], ids=["generic", "phone"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_valid_plan(
    demo: Checkpoint, method: str, capabilities: Capabilities
) -> None:
    if capabilities is PHONE and method in ("3", "6"):
        with pytest.raises(InputError, match=f"at {method} bits") as caught:
            make_plan(demo, capabilities, method, None)
        assert "2 bits, 4 bits, 8 bits" in str(caught.value)
        return
    plan = make_plan(demo, capabilities, method, None, target="here")
    check_plan(plan, demo, capabilities)
    assert [row.name for row in plan.rows] == list(demo.tensors)
    assert (plan.method, plan.target, plan.num_params) == (method, "here", demo.num_params)
    for row in plan.rows:
        assert row.reason
        assert (row.grid == "none") == (row.role not in QUANTIZED_ROLES or method == "none")
    if method in ("auto", "alphaq", "uniform"):
        assert plan.limit_nbytes is not None
        assert plan.nbytes <= plan.limit_nbytes
        assert 4.0 < plan.bits_per_weight <= 4.5
    else:
        assert plan.limit_nbytes is None


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["auto", "alphaq", "uniform", "3", "4"]),
    st.floats(1.5, 9),
    st.booleans(),
)
def test_a_budget_is_never_exceeded(
    make_checkpoint: MakeCheckpoint, method: str, bits: float, has_max_bytes: bool
) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    limit = int(bits * checkpoint.num_params / 8)
    budget = Budget(bits, limit - 100 if has_max_bytes else None)
    try:
        plan = make_plan(checkpoint, GENERIC, method, budget)
    except InputError:
        return
    assert plan.nbytes <= budget.limit(checkpoint.num_params) <= limit
    assert sum(row.nbytes for row in plan.rows) == plan.nbytes


@pytest.mark.parametrize("method", ["auto", "uniform", "4", "none"])
def test_a_budget_that_is_too_small_states_the_smallest(demo: Checkpoint, method: str) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(demo, PHONE, method, Budget(bits_per_weight=1.0))
    sizes = re.search(r"at least ([\d.]+) bits per weight, (\d+) bytes", str(caught.value))
    assert sizes is not None
    smallest = int(sizes.group(2))
    assert float(sizes.group(1)) == pytest.approx(8 * smallest / demo.num_params, abs=1e-3)
    if method == "auto":
        plan = make_plan(demo, PHONE, method, Budget(max_bytes=smallest))
        assert plan.nbytes == smallest
        with pytest.raises(InputError):
            make_plan(demo, PHONE, method, Budget(max_bytes=smallest - 1))


@pytest.mark.parametrize("method", ["auto", "alphaq"])
def test_the_same_seed_gives_the_same_plan_to_the_byte(
    make_checkpoint: MakeCheckpoint, method: str
) -> None:
    checkpoint, budget = make_checkpoint("lfm2_moe"), Budget(12.0)
    first, second = (
        make_plan(checkpoint, PHONE, method, budget, seed=5).to_json() for _ in range(2)
    )
    assert first == second


def test_a_plan_opens_no_file_but_the_checkpoint_and_its_cache(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cache = make_checkpoint("lfm2_moe"), tmp_path / "cache"
    monkeypatch.setenv("LFMC_CACHE", str(cache))
    for effort in ("best", "max"):
        monkeypatch.setitem(
            fit.RECIPES, effort, FitRecipe(8, 16, TrainingSchedule(2, 4), TrainingSchedule(2, 4))
        )
    make_plan(checkpoint, PHONE, "auto", Budget(12.0), effort=Effort("best"))  # imports happen here
    opened: list[str] = []
    watching = True
    null_device = (os.devnull, None, os.O_WRONLY | os.O_CLOEXEC)  # for the output of the solver

    def watch(event: str, args: tuple[object, ...]) -> None:
        if watching and event == "open" and args != null_device:
            opened.append(str(args[0]))
        assert not (watching and event.startswith("socket.")), event

    sys.addaudithook(watch)
    parts = checkpoint.path, checkpoint.name, checkpoint.config, checkpoint.raw_config
    unread = Checkpoint(*parts, checkpoint.tensors)
    for method in ("auto", "alphaq", "uniform", "4"):
        make_plan(unread, PHONE, method, Budget(12.0), resources=Resources(cache=Cache(cache)))
    for effort in ("best", "max"):
        make_plan(unread, PHONE, "4", Budget(12.0), effort=Effort(effort))
    watching = False
    assert opened
    assert {p for p in opened if not p.startswith((str(checkpoint.path), str(cache)))} == set()
    assert any(path.startswith(str(cache)) for path in opened)


def test_spectra_are_cached_by_their_matrix(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    resources = Resources(cache=Cache(tmp_path / "cache"))
    plans = [
        make_plan(checkpoint, PHONE, "alphaq", Budget(bits), resources=resources)
        for bits in (12.0, 13.0)
    ]
    assert plans[0] == make_plan(checkpoint, PHONE, "alphaq", Budget(12.0))
    monkeypatch.setattr(alphaq, "measure_task", lambda task: pytest.fail("measured again"))
    assert plans[1] == make_plan(checkpoint, PHONE, "alphaq", Budget(13.0), resources=resources)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="run it on a machine with a CUDA device")
def test_a_gpu_chooses_the_same_widths(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    by_cpu, by_gpu = (
        make_plan(checkpoint, PHONE, "alphaq", Budget(12.0), effort=Effort(device=device))
        for device in ("cpu", "cuda")
    )
    assert {r.name: r.format for r in by_cpu.rows} == {r.name: r.format for r in by_gpu.rows}


def test_a_cache_changes_no_plan(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, cache = make_checkpoint("lfm2_moe"), Cache(tmp_path / "cache")
    messages: list[str] = []

    def plan_json(bits: float, cache: Cache, seed: int = 0) -> str:
        messages.clear()
        resources = Resources(cache=cache)
        plan = make_plan(
            checkpoint,
            PHONE,
            "auto",
            Budget(bits),
            seed=seed,
            progress=messages.append,
            resources=resources,
        )
        return plan.to_json()

    first = plan_json(12.0, cache)
    assert first == plan_json(12.0, NO_CACHE)
    assert any(message.startswith("sensitivity") for message in messages)
    assert plan_json(13.0, cache) == plan_json(13.0, NO_CACHE)
    plan_json(13.0, cache)
    assert not any(message.startswith("sensitivity") for message in messages)
    plan_json(13.0, cache, seed=1)
    assert any(message.startswith("sensitivity") for message in messages)
    entry = sorted(cache.folder.glob("*/*.json"))[0]  # type: ignore[union-attr]
    entry.write_text(entry.read_text()[:-20])
    assert plan_json(12.0, cache) == first


def test_a_large_model_uses_shorter_texts(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Sample.for_model(auto.LARGE - 1) == Sample(2, 16)
    assert Sample.for_model(auto.LARGE) == Sample(96, 32, has_states=True)
    for name, value in (("LARGE", 1), ("LARGE_TEXTS", 3), ("LARGE_LENGTH", 5)):
        monkeypatch.setattr(auto, name, value)
    plan = make_plan(make_checkpoint("lfm2"), GENERIC, "auto", Budget(5.0))
    reasons = [row.reason for row in plan.rows if row.role in QUANTIZED_ROLES]
    assert all(reason.endswith("3 texts of 5 tokens") for reason in reasons)


def test_auto_gives_experts_of_one_layer_one_layout(demo: Checkpoint) -> None:
    plan = make_plan(demo, PHONE, "auto", Budget(3.5))
    layouts: dict[str, set[tuple[int, bool]]] = {}
    for row in plan.rows:
        if row.role == "expert":
            f = parse_format(row.format)
            assert isinstance(f, Format)
            layer = row.name.split(".experts.")[0]
            layouts.setdefault(layer, set()).add((f.group, f.symmetric))
    assert len(layouts) == 5
    assert all(len(pairs) == 1 for pairs in layouts.values())


def test_alphaq_allocates_to_experts(demo: Checkpoint, make_checkpoint: MakeCheckpoint) -> None:
    plan = make_plan(demo, GENERIC, "alphaq", Budget(3.5))
    for row in plan.rows:
        f = parse_format(row.format)
        if row.role == "expert":
            assert row.alpha is not None
            assert isinstance(f, Format)
            assert f.bits in (2, 3, 4, 8)
            assert (f.group, f.symmetric, row.grid) == (64, False, "minmax")
        elif row.role in QUANTIZED_ROLES:
            assert f == Format(4, 64, False, "float16")
    with pytest.raises(InputError, match="this model has none"):
        make_plan(make_checkpoint("lfm2"), GENERIC, "alphaq", None)


def test_alphaq_refuses_a_budget_too_small_for_experts(demo: Checkpoint) -> None:
    with pytest.raises(InputError, match="AlphaQ does not fit"):
        make_plan(demo, GENERIC, "alphaq", Budget(2.5))


def test_options_of_alphaq(demo: Checkpoint) -> None:
    def plan_with(**settings: object) -> BitPlan:
        options = AlphaQOptions(**settings)  # type: ignore[arg-type]
        return make_plan(demo, GENERIC, "alphaq", Budget(4.0), alphaq=options)

    base = plan_with()
    assert plan_with(bits=(2, 3, 4, 8)) == base == make_plan(demo, GENERIC, "alphaq", Budget(4.0))
    formats = {row.format for row in plan_with(bits=(3, 6)).rows if row.role == "expert"}
    assert formats == {f"int{bits}-g64-asym-float16" for bits in (3, 6)}
    name = "model.layers.1.feed_forward.experts.0.w1.weight"
    assert plan_with(tail=0.3).row(name).alpha != base.row(name).alpha
    assert plan_with(block=64).row(name).alpha != base.row(name).alpha
    steep = plan_with(gamma=10.0)
    assert steep.row(name).alpha == base.row(name).alpha
    assert [row.format for row in steep.rows] != [row.format for row in base.rows]


def test_alphaq_refuses_unsupported_widths(demo: Checkpoint) -> None:
    with pytest.raises(InputError, match="does not support all of the requested") as caught:
        make_plan(demo, PHONE, "alphaq", None, alphaq=AlphaQOptions(bits=(2, 3, 4)))
    assert caught.value.expected == "widths of 2, 4, 8"


@pytest.mark.parametrize("method", ["auto", "uniform", "4", "none"])
def test_options_of_another_method_are_refused(demo: Checkpoint, method: str) -> None:
    with pytest.raises(InputError, match="for method 'alphaq'"):
        make_plan(demo, GENERIC, method, None, alphaq=AlphaQOptions())


def test_uniform_is_one_format(demo: Checkpoint) -> None:
    plan = make_plan(demo, GENERIC, "uniform", Budget(4.5))
    formats = {row.format for row in plan.rows if row.role in QUANTIZED_ROLES}
    assert formats == {"int4-g64-asym-float16"}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(None, "int4-g32-asym-float16"), (Budget(4.5), "int4-g64-asym-float16")],
)
def test_a_plain_width(demo: Checkpoint, budget: Budget | None, expected: str) -> None:
    plan = make_plan(demo, GENERIC, "4", budget)
    assert {row.format for row in plan.rows if row.role in QUANTIZED_ROLES} == {expected}


def test_a_plain_width_too_large_for_the_budget_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(InputError, match="no format of method '8 bits' fits"):
        make_plan(demo, GENERIC, "8", Budget(4.5))


def test_floats_keep_their_dtype_if_the_target_supports_it(demo: Checkpoint) -> None:
    generic = make_plan(demo, GENERIC, "none", None)
    assert generic.row("model.embed_tokens.weight").format == "bfloat16"
    assert generic.row("model.layers.1.feed_forward.expert_bias").format == "float32"
    embedding = make_plan(demo, PHONE, "none", None).row("model.embed_tokens.weight")
    assert embedding.format == "float32"
    assert embedding.reason.endswith("the target does not store bfloat16")


def test_a_target_without_integers_stores_floats(demo: Checkpoint) -> None:
    floats_only = Capabilities((), (), (), ("bfloat16", "float32"))
    with pytest.raises(UnsupportedError, match="no integer format for embedding"):
        make_plan(demo, floats_only, "auto", None)
    check_plan(make_plan(demo, floats_only, "none", None), demo, floats_only)


def test_no_floats_at_all_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(UnsupportedError, match="no floating-point tensors"):
        make_plan(demo, replace(GENERIC, floats=()), "uniform", None)


@pytest.mark.parametrize("method", ["5", "automatic", ""])
def test_an_unknown_method_is_refused(demo: Checkpoint, method: str) -> None:
    with pytest.raises(InputError, match="no such method"):
        make_plan(demo, GENERIC, method, None)


@pytest.mark.parametrize("numbers", [(None, None), (0.0, None), (None, -5)])
def test_a_budget_is_a_positive_number(numbers: tuple[float | None, int | None]) -> None:
    with pytest.raises(LfmcError, match="positive"):
        Budget(*numbers)


@pytest.mark.parametrize("model_type", ["lfm2", "lfm3"])
def test_dense_models(make_checkpoint: MakeCheckpoint, model_type: str) -> None:
    checkpoint = make_checkpoint(model_type, tie_word_embeddings=False)
    messages: list[str] = []
    plan = make_plan(checkpoint, GENERIC, "auto", Budget(5.0), progress=messages.append)
    check_plan(plan, checkpoint, GENERIC)
    assert plan.predicted_kl is not None
    assert plan.predicted_kl > 0
    assert messages[0] == "text from the model: token 2 of 16"


class _Killed(Exception):
    """Replaces a signal that kills the process."""


def _plan_until(message: str | None, checkpoint: Checkpoint, cache: Cache) -> tuple[str, list[str]]:
    """Return a plan and its messages; with `message`, stop there and return no plan."""
    messages: list[str] = []

    def report(detail: str) -> None:
        if message is not None and detail.startswith(message):
            raise _Killed
        messages.append(detail)

    try:
        plan = make_plan(
            checkpoint,
            GENERIC,
            "auto",
            Budget(5.0),
            progress=report,
            resources=Resources(cache=cache),
        )
    except _Killed:
        return "", messages
    return plan.to_json(), messages


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe"])
def test_a_killed_plan_continues_where_it_was(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_type: str,
    large: bool,
) -> None:
    if large:
        for name, value in (("LARGE", 1), ("LARGE_TEXTS", 3), ("LARGE_LENGTH", 5)):
            monkeypatch.setattr(auto, name, value)
    checkpoint, cache = make_checkpoint(model_type), Cache(tmp_path / "cache")
    expected, all_messages = _plan_until(None, checkpoint, NO_CACHE)
    layers = checkpoint.config.num_layers
    stops = [
        "sensitivity: head",
        f"sensitivity: backward, layer {layers} ",
        f"sensitivity: backward, layer {layers - 1} ",
        "choosing formats",
    ]
    if not large:
        stops.insert(0, "sensitivity: forward, layer 2 ")
    measured: list[str] = []
    for stop in (*stops, None):
        plan, messages = _plan_until(stop, checkpoint, cache)
        measured += [m.partition(" of ")[0] for m in messages if m.startswith(("text", "sens"))]
    assert plan == expected
    work = [m.partition(" of ")[0] for m in all_messages if m.startswith(("text", "sens"))]
    assert sorted(measured) == sorted(work)
    assert not any((tmp_path / "cache" / UNFINISHED).iterdir())
