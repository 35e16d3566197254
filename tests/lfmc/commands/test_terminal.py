"""What a person sees: the first second, bars, narrow terminals, closed pipes, colors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lfmc.cli import cli
from tests.lfmc.commands.processes import LFMC, run_on_terminal, run_shell

COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38|48|4[0-7])[;m]")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
STAGE = re.compile(r"^\[(\d+)/(\d+)\] (.+): \d+\.\d s, peak memory [\d.]+ GiB$")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect"], 0),
        (["inspect", "--json"], 0),
        (["export", "--target", "onx"], 2),
        (["plan", "--target", "onx"], 2),
        (["export", "nowhere"], 2),
        (["verify", "nowhere"], 2),
        (["generate", "nowhere", "hi"], 2),
    ],
    ids=str,
)
def test_an_answer_without_torch(arguments: list[str], code: int) -> None:
    """torch takes seconds to import, so a command that does not need it must not import it."""
    script = (
        "import sys\n"
        f"sys.argv = ['lfmc', *{arguments!r}]\n"
        "from lfmc.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: code = error.code\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
        f"assert code == {code}, code"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_pipe_shows_a_line_at_once() -> None:
    command = [*LFMC, "plan", "--bits", "uniform"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        started = time.monotonic()
        assert process.stderr.readline().decode().rstrip().endswith(": plan")
        assert time.monotonic() - started < 1.5  # a second, and time for a busy machine
        process.kill()


def stages(stderr: str) -> list[tuple[int, int, str]]:
    matches = (STAGE.match(line) for line in stderr.splitlines())
    return [(int(m[1]), int(m[2]), m[3]) for m in matches if m]


def test_an_export_announces_as_many_stages_as_it_runs(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, bundle = tiny_checkpoint("lfm2"), str(tmp_path / "b")
    options = ("--bits", "4", "--context", "64", "--check", "fast")
    _, stderr = run_here("export", model, *options, "--output", bundle)
    lines = stderr.splitlines()
    assert lines[0].endswith(": export")
    assert lines[1].startswith("load: ")
    numbers = stages(stderr)
    assert [number for number, _, _ in numbers] == list(range(1, len(numbers) + 1))
    assert {total for _, total, _ in numbers} == {len(numbers)}
    assert len(lines) == 2 + len(numbers)
    _, stderr = run_here("verify", bundle, model, "--check", "fast", "--verbose")
    numbers = stages(stderr)
    assert {total for _, total, _ in numbers} == {len(numbers)}
    assert re.search(r"^  transformers, layer 1 of \d+$", stderr, re.M)
    assert re.search(r"^  tensor 1 of \d+$", stderr, re.M)
    stdout, stderr = run_here("verify", bundle, "--quiet")
    assert stderr == ""
    assert "golden prompts" in stdout


def run_here(*arguments: str | Path) -> tuple[str, str]:
    """Run lfmc in this process, which has imported torch already; return stdout and stderr."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout, result.stderr


def test_a_terminal_shows_bars_and_the_seconds_of_each_stage(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    arguments = ("plan", tiny_checkpoint("lfm2"), "--no-cache")
    code, output = run_on_terminal(*arguments)
    assert code == 0, output
    text = CONTROL.sub("", output)
    assert "plan, stage 1 of 1" in text
    assert re.search(r"plan: text from the model: token \d+ of 96", text)
    assert re.search(r"\d+:\d\d left", text)
    assert re.search(r"\[1/1\] plan: \d+\.\d s", text)


def test_quiet_and_verbose_exclude_each_other() -> None:
    process = run_shell("lfmc plan -q -v")
    assert process.returncode == 2
    assert "exclude each other" in process.stderr


def test_no_color_is_obeyed() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    arguments = ("plan", "--bits", "uniform", "--no-cache")
    _, output = run_on_terminal(*arguments, env=environment)
    assert COLOR.search(output)  # the bars
    _, output = run_on_terminal(*arguments, env={**environment, "NO_COLOR": "1"})
    assert not COLOR.search(output)


def test_a_dumb_terminal_gets_lines() -> None:
    code, output = run_on_terminal("plan", "--bits", "uniform", env={"TERM": "dumb"})
    assert code == 0
    assert "\x1b[?25l" not in output  # the cursor stays
    assert re.search(r"\[1/1\] plan: \d+\.\d s", output)


@pytest.mark.parametrize("arguments", [["inspect"], ["plan", "--bits", "uniform"]], ids=" ".join)
def test_tables_fit_60_columns(arguments: list[str]) -> None:
    code, output = run_on_terminal(*arguments, columns=60)
    assert code == 0
    text = CONTROL.sub("", output)
    table = text[text.index("layers:" if arguments[0] == "inspect" else "plan: uniform") :]
    assert "…" not in table
    assert all(len(line) <= 60 for line in table.splitlines()[1:])


@pytest.mark.parametrize("command", ["lfmc inspect", "lfmc --help", "lfmc plan --bits 4 --json"])
def test_a_closed_pipe_is_no_fault(command: str) -> None:
    """`exec <&-` closes the pipe before lfmc writes to it."""
    process = run_shell(f"{{ {command}; echo $? >&2; }} | {{ exec <&-; sleep 0; }}")
    assert process.stderr.splitlines()[-1] == "0"
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


def test_a_closed_stderr_does_not_stop_a_command(tmp_path: Path) -> None:
    line = "{ lfmc plan --bits 4 --output plan.json 2>&3 >out.txt; echo $? >code; } 3> >(exec <&-)"
    run_shell(f"{line}; sleep 1", cwd=tmp_path)
    assert (tmp_path / "plan.json").is_file()
    assert (tmp_path / "code").read_text().strip() == "0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export --bit 4 --json", "--bits"),
        ("exprot --json", "did you mean 'export'?"),
        ("plan --bits-per-weight many --json", "many"),
        ("plan --max-size 12 --json", "write 12MB"),
    ],
)
def test_usage_errors_are_json(arguments: str, message: str) -> None:
    process = run_shell(f"lfmc {arguments}")
    error = json.loads(process.stdout)
    assert error["exit_code"] == process.returncode == 2
    assert message in error["details"]
    assert message in process.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lfmc ex", "plain,export"),
        ("lfmc export --target e", "plain,ethos-u\nplain,executorch"),
        ("lfmc plan --bits a", "plain,auto\nplain,alphaq"),
        ("lfmc export ./mod", "dir,./mod"),
        ("lfmc generate bun", "dir,bun"),
        ("lfmc export --plan pl", "file,pl"),
        ("lfmc export --check f", "plain,full\nplain,fast"),
    ],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_LFMC_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    process = subprocess.run(LFMC, env=environment, capture_output=True, text=True, check=False)
    assert process.stdout.strip() == expected
