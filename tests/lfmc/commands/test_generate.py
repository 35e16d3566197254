"""`lfmc generate`: prompts, chat templates, sampling settings, and what is printed on stderr."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import lfmc
from lfmc.checkpoint.chat_template import TEMPLATE
from lfmc.cli import cli
from lfmc.errors import InputError

PROMPT = "Once upon a time"
COUNT = ("--max-tokens", "6")


def generate(*arguments: str | Path, stdin: str | None = None) -> Result:
    """Run `lfmc generate` in this process; errors of lfmc are raised."""
    command = ["generate", *map(str, arguments)]
    result = CliRunner().invoke(
        cli, command, input=stdin, catch_exceptions=False, standalone_mode=False
    )
    return result


def generate_json(*arguments: str | Path) -> dict[str, object]:
    result: dict[str, object] = json.loads(generate(*arguments, "--json").stdout)
    return result


@pytest.fixture
def edit_manifest(bundle_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the bundle with other keys in its manifest."""

    def edit(**changes: object) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(bundle_path, folder)
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return edit


@pytest.fixture
def plain_bundle(bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle without a chat template."""
    folder = tmp_path / "plain"
    shutil.copytree(bundle_path, folder)
    (folder / TEMPLATE).unlink()
    return folder


def test_the_template_is_used_if_there_is_one(bundle_path: Path) -> None:
    by_default = generate_json(bundle_path, PROMPT, *COUNT)
    required = generate_json(bundle_path, PROMPT, *COUNT, "--chat")
    raw = generate_json(bundle_path, PROMPT, *COUNT, "--raw")
    assert by_default["prompt"] == required["prompt"] != raw["prompt"]
    text = lfmc.load_tokenizer(bundle_path).decode(by_default["prompt"], skip_special_tokens=False)
    assert text.endswith(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")


def test_a_system_message_comes_first(bundle_path: Path) -> None:
    result = generate_json(bundle_path, PROMPT, *COUNT, "--system", "Be brief.")
    text = lfmc.load_tokenizer(bundle_path).decode(result["prompt"], skip_special_tokens=False)
    assert text.index("Be brief.") < text.index(PROMPT)
    assert "<|im_start|>system\nBe brief." in text


def test_plain_text_is_printed_with_its_prompt_and_an_answer_without(bundle_path: Path) -> None:
    raw = generate(bundle_path, PROMPT, *COUNT, "--raw").stdout
    assert raw.startswith(PROMPT)
    assert not generate(bundle_path, PROMPT, *COUNT).stdout.startswith(PROMPT)
    text = generate_json(bundle_path, PROMPT, *COUNT, "--raw")["text"]
    assert raw == f"{PROMPT}{text}\n"


def test_a_bundle_without_a_template_continues_plain_text(plain_bundle: Path) -> None:
    assert generate(plain_bundle, PROMPT, *COUNT).stdout.startswith(PROMPT)
    for option in (["--chat"], ["--system", "Be brief."]):
        with pytest.raises(InputError, match="no chat template"):
            generate(plain_bundle, PROMPT, *option)


@pytest.mark.parametrize("option", [["--chat"], ["--system", "Be brief."]])
def test_raw_excludes_the_options_of_a_template(bundle_path: Path, option: list[str]) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        generate(bundle_path, PROMPT, "--raw", *option)


def test_the_prompt_may_come_from_stdin(bundle_path: Path) -> None:
    expected = generate(bundle_path, PROMPT, *COUNT, "--raw").stdout
    assert generate(bundle_path, "-", *COUNT, "--raw", stdin=f"{PROMPT}\n").stdout == expected
    with pytest.raises(InputError, match="stdin is empty"):
        generate(bundle_path, "-", stdin="")


def test_speed_is_printed_on_stderr_unless_quiet(bundle_path: Path) -> None:
    result = generate(bundle_path, PROMPT, *COUNT, "--raw")
    pattern = r"prefill: 6 tokens, [\d.]+ tokens/s; decode: 6 tokens, [\d.]+ tokens/s"
    assert re.search(pattern, result.stderr), result.stderr
    assert generate(bundle_path, PROMPT, *COUNT, "--quiet").stderr == ""
    rates = generate_json(bundle_path, PROMPT, *COUNT)["tokens_per_second"]
    assert isinstance(rates, dict)
    assert min(rates.values()) > 0


def test_a_full_context_is_told(bundle_path: Path) -> None:
    result = generate(bundle_path, PROMPT, "--raw", "--max-tokens", "500")
    assert "the context of 200 tokens is full" in result.stderr
    assert "context" not in generate(bundle_path, PROMPT, *COUNT, "--raw").stderr
    assert generate_json(bundle_path, PROMPT, "--raw", "--max-tokens", "500")["end"] == "context"
    assert generate_json(bundle_path, PROMPT, "--raw", *COUNT)["end"] == "length"


def test_the_settings_of_the_bundle_are_defaults(
    bundle_path: Path, edit_manifest: Callable[..., Path]
) -> None:
    def tokens(folder: Path, *options: str) -> object:
        return generate_json(folder, PROMPT, "--raw", "--seed", "3", *COUNT, *options)["tokens"]

    greedy = tokens(bundle_path)
    folder = edit_manifest(sampling={"temperature": 5.0, "min_p": 0.0001})
    sampled = tokens(folder)
    assert sampled != greedy
    assert sampled == tokens(bundle_path, "--temperature", "5", "--min-p", "0.0001")
    assert tokens(folder, "--temperature", "0") == greedy
    assert tokens(folder, "--top-k", "1") == greedy
    assert tokens(folder, "--top-p", "0") == greedy


def test_python_has_the_same_meaning(bundle_path: Path) -> None:
    model = lfmc.load(bundle_path)
    for options, arguments in (
        ((), {}),
        (("--raw", "--repetition-penalty", "1.3"), {"raw": True, "repetition_penalty": 1.3}),
        (("--system", "Be brief."), {"system": "Be brief."}),
        (
            ("--temperature", "2", "--top-k", "9", "--top-p", "0.9", "--min-p", "0.01"),
            {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
        ),
    ):
        pieces = lfmc.generate(bundle_path, PROMPT, max_tokens=6, model=model, **arguments)  # type: ignore[arg-type]
        assert "".join(pieces) == generate_json(bundle_path, PROMPT, *COUNT, *options)["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature is out of range"),
        (["--top-p", "2"], "top_p is out of range"),
        (["--top-k", "5"], "no effect at temperature 0"),
    ],
)
def test_wrong_settings_are_errors(bundle_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(bundle_path, PROMPT, *options)
