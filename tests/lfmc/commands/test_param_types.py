"""Values of options: what is read, and the advice for misspelled ones."""

from __future__ import annotations

import pytest

from lfmc.calib_free.make_plan import METHODS
from lfmc.commands.param_types import (
    BITS,
    Bits,
    Model,
    Setting,
    TargetName,
    advise_bits,
    parse_size,
)
from lfmc.errors import InputError, did_you_mean
from lfmc.targets.base import choose_options, get_target, target_names


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("int4", "write --bits 4"),
        ("4bit", "write --bits 4"),
        ("4-bit", "write --bits 4"),
        ("8 bits", "write --bits 8"),
        ("w4a16", "write --bits 4"),
        ("q8_0", "write --bits 8"),
        ("nf4", "write --bits 4"),
        ("q4_k_m", "write --bits 4, or --bits-per-weight 4.5 for mixed widths"),
        ("Q5_K_M", "write --bits 6, or --bits-per-weight 5.5 for mixed widths"),
        ("iq3_xxs", "write --bits 3, or --bits-per-weight 3.5 for mixed widths"),
        ("fp16", "write --bits none, which quantizes nothing"),
        ("bf16", "write --bits none, which quantizes nothing"),
        ("float32", "write --bits none, which quantizes nothing"),
        ("16", "write --bits none, which quantizes nothing"),
        ("Auto", "did you mean 'auto'?"),
        ("uniforn", "did you mean 'uniform'?"),
    ],
)
def test_spellings_of_other_tools_get_advice(text: str, advice: str) -> None:
    assert advise_bits(text) == advice
    with pytest.raises(InputError) as error:
        Bits().convert(text, None, None)
    assert advice in str(error.value)


@pytest.mark.parametrize("text", ["7", "4.5", "3,4", "plan.json"])
def test_other_values_are_left_to_the_planner(text: str) -> None:
    assert Bits().convert(text, None, None) == text


def test_every_method_of_the_planner_is_a_value() -> None:
    assert set(BITS) <= set(METHODS)
    for method in METHODS:
        assert Bits().convert(method, None, None) == method


def test_sizes_have_a_unit() -> None:
    texts = ("12MB", "12 MiB", "1.5GB", "700M", "64kB", "123456B", "1ki")
    sizes = [12 * 10**6, 12 * 2**20, 15 * 10**8, 7 * 10**8, 64_000, 123_456, 1024]
    assert [parse_size(text) for text in texts] == sizes


def test_a_size_without_a_unit_is_refused_with_the_right_form() -> None:
    with pytest.raises(InputError) as error:
        parse_size("12")
    assert error.value.todo == "write 12MB, 12MiB or 12GB, or 12B for bytes"


def test_a_value_without_its_option_is_completed() -> None:
    with pytest.raises(InputError) as error:
        Setting().convert("genai", None, None)
    assert error.value.todo == "write -O layout=genai (onnx)"
    with pytest.raises(InputError) as error:
        Setting().convert("dialect", None, None)
    assert error.value.todo == "write -O dialect=linalg|torch|stablehlo|tosa (mlir)"


def test_an_option_of_another_target_names_that_target() -> None:
    with pytest.raises(InputError) as error:
        choose_options(get_target("onnx"), {"soc": "sm8750"})
    assert error.value.todo == (
        "soc is an option of target qualcomm: leave it out, or add --target qualcomm"
    )


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [("layuot", "plain", "layout"), ("layout", "gen-ai", "genai"), ("layout", "Plain", "plain")],
)
def test_similar_options_and_values_are_suggested(name: str, value: str, advice: str) -> None:
    with pytest.raises(InputError) as error:
        choose_options(get_target("onnx"), {name: value})
    assert error.value.todo == f"did you mean '{advice}'?"


def test_nothing_similar_is_no_suggestion() -> None:
    assert did_you_mean("abacus", target_names()) is None
    assert did_you_mean("core-ml", target_names()) == "did you mean 'coreml'?"


def test_completions() -> None:
    def words(param_type: TargetName | Bits | Model, incomplete: str) -> list[str]:
        return [item.value for item in param_type.shell_complete(None, None, incomplete)]

    assert words(TargetName(), "e") == ["ethos-u", "executorch"]
    assert words(Bits(), "a") == ["auto", "alphaq"]
    (item,) = Model().shell_complete(None, None, "LFM")
    assert (item.type, item.value) == ("dir", "LFM")
