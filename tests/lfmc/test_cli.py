"""The command line in separate processes: output, exit codes, JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMANDS = ("doctor", "inspect", "plan", "export", "verify", "diff", "generate", "bench")


def lfmc(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfmc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_lists_every_command_and_imports_no_large_package() -> None:
    process = lfmc("--help")
    assert process.returncode == 0
    assert all(name in process.stdout for name in COMMANDS)
    code = (
        "import sys; sys.argv = ['lfmc', '--help']\n"
        "from lfmc.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "large = {'torch', 'numpy', 'transformers', 'onnx', 'rich', 'scipy'} & set(sys.modules)\n"
        "assert not large, large"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    process = lfmc(command, "--help")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Usage:")


def test_doctor_and_inspect(tmp_path: Path) -> None:
    facts = json.loads(lfmc("doctor", "--json", cwd=tmp_path).stdout)
    onnx = facts["targets"]["onnx"]
    assert (onnx["ready"], onnx["missing"]) == (True, [])
    assert onnx["options"] == {"layout": ["plain", "genai", "transformers.js"]}
    lines = [line.strip() for line in lfmc("doctor", cwd=tmp_path).stdout.splitlines()]
    assert any(line.startswith("-O layout=plain | genai | transformers.js:") for line in lines)
    inspection = json.loads(lfmc("inspect", "--json", cwd=tmp_path).stdout)
    assert inspection["parameters"] == 7_881_256
    first = inspection["memory"][0]
    assert (first["context"], first["attention"], first["conv"]) == (512, 2**20, 4 * 256 * 2 * 4)
    assert first["total"] == first["weights"] + first["attention"] + first["conv"]
    assert first["all_attention_total"] == first["weights"] + 3 * 2**20
    table = lfmc("inspect", cwd=tmp_path).stdout
    assert "7,881,256" in table
    assert "estimate" in table


def test_reports_are_only_overwritten_with_force(tmp_path: Path) -> None:
    for command in (["inspect"], ["plan", "--bits", "uniform"]):
        page = tmp_path / f"{command[0]}.html"
        process = lfmc(*command, "--report", page)
        assert process.returncode == 0, process.stderr
        assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        assert f"report: {page}" in process.stdout
        repeated = lfmc(*command, "--report", page)
        assert repeated.returncode == 2
        assert "--force" in repeated.stderr
        assert lfmc(*command, "--report", page, "--force").returncode == 0


def test_plan_prints_a_table_and_writes_a_file(tmp_path: Path) -> None:
    process = lfmc("plan", "--bits", "4", "--output", "plan.json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "experts" in process.stdout
    assert "bits per weight" in process.stdout
    assert "no MODEL given" in process.stderr
    assert len(json.loads((tmp_path / "plan.json").read_text())["rows"]) == 171
    repeated = lfmc("plan", "--bits", "4", "--output", "plan.json", cwd=tmp_path)
    assert repeated.returncode == 2
    assert "--force" in repeated.stderr


def test_the_options_of_alphaq_reach_the_plan(tmp_path: Path) -> None:
    options = ("--alphaq-bits", "2,8", "--alphaq-gamma", "10", "--alphaq-block", "64")
    options += ("--alphaq-tail", "0.2")
    process = lfmc("plan", "--bits", "alphaq", "--json", *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = [row for row in json.loads(process.stdout)["rows"] if row["role"] == "expert"]
    assert {row["format"].split("-")[0] for row in rows} == {"int2", "int8"}


def test_export_dry_run_writes_nothing(tmp_path: Path) -> None:
    process = lfmc("export", "--bits", "4", "--dry-run", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "nothing was written" in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_export_prints_tables_and_writes_one_folder(tmp_path: Path) -> None:
    process = lfmc("export", "--bits", "4", "--check", "fast", "--context", "64", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for word in ("fuse-gated-short-conv 4", "parity", "KL", "top-1", "bits per weight", "bundle:"):
        assert word in process.stdout
    assert "Warning" not in process.stderr
    assert process.stderr.count("no MODEL given") == 1
    assert (tmp_path / "lfmc2").exists() is False
    assert [p.name for p in tmp_path.iterdir()] == ["lfm2-moe-8m-onnx"]


def test_generate_verify_and_bench(bundle_path: Path) -> None:
    options = ("--raw", "--max-tokens", "8", "--json")
    text = lfmc("generate", bundle_path, "Once upon a time", *options)
    assert len(json.loads(text.stdout)["tokens"]) == 8
    sampling = ("--raw", "--temperature", "1", "--json")
    samples = [
        json.loads(lfmc("generate", bundle_path, "The", *sampling, "--seed", seed).stdout)["tokens"]
        for seed in ("1", "1", "2")
    ]
    assert samples[0] == samples[1] != samples[2]
    verification = lfmc("verify", bundle_path)
    assert verification.returncode == 0, verification.stderr
    assert "golden prompts: 3" in verification.stdout
    lengths = ("--prompt", "16", "--tokens", "4", "--rounds", "2")
    rates = json.loads(lfmc("bench", bundle_path, *lengths, "--json").stdout)
    assert rates["decode"]["best"] > 0


def test_verify_against_the_checkpoint(bundle_path: Path) -> None:
    process = lfmc("verify", bundle_path, "demo", "--check", "fast", "--json")
    assert process.returncode == 0, process.stderr
    assert all(rung["passed"] for rung in json.loads(process.stdout)["parity"])


def test_verify_rejects_a_changed_bundle(bundle_path: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle_path, tmp_path / "b")
    path = tmp_path / "b" / "model.onnx.data"
    data = bytearray(path.read_bytes()[:-1] + b"\x00\x01"[:1])
    data[1000] ^= 1
    path.write_bytes(bytes(data))
    process = lfmc("verify", tmp_path / "b")
    assert process.returncode == 3
    assert "model.onnx.data" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "nowhere"], 2, "no such checkpoint"),
        (["export", "--target", "abacus"], 2, "no such target"),
        (["export", "--bits", "3"], 2, "2 bits, 4 bits, 8 bits"),
        (["export", "--bits", "7"], 2, "no such method"),
        (["export", "--context", "99999999"], 2, "context"),
        (["export", "--max-size", "lots"], 2, "size can't be read"),
        (["export", "--max-size", "12"], 2, "write 12MB"),
        (["export", "--bits", "q4_k_m"], 2, "write --bits 4"),
        (["export", "--target", "onx"], 2, "did you mean 'onnx'?"),
        (["export", "--soc", "sm8750"], 2, "add --target qualcomm"),
        (["exprot"], 2, "did you mean 'export'?"),
        (["export", "--max-size", "10kB", "--bits", "uniform"], 2, "smallest possible"),
        (["export", "--frobnicate"], 2, "No such option"),
        (["export", "-O", "genai"], 2, "NAME=VALUE"),
        (["export", "-O", "colour=red"], 2, "has no such option"),
        (["export", "-O", "layout=round"], 2, "plain, genai, transformers.js"),
        (["plan", "--bits-per-weight", "-1"], 2, "positive"),
        (["plan", "--output", "a", "--report", "a"], 2, "same file"),
        (["plan", "--effort", "best"], 2, "--output plan.json"),
        (["plan", "--effort", "utmost"], 2, "no such effort"),
        (["export", "--minutes", "3"], 2, "minutes limit"),
        (["export", "--effort", "best", "--bits", "none"], 2, "nothing to fit"),
        (["inspect", "--report", "nowhere/a.html"], 2, "can't be written"),
        (["plan", "--alphaq-gamma", "1"], 2, "for method 'alphaq'"),
        (["export", "--bits", "uniform", "--alphaq-tail", "0.2"], 2, "for method 'alphaq'"),
        (["plan", "--bits", "alphaq", "--alphaq-gamma", "-1"], 2, "gamma is out of range"),
        (["plan", "--bits", "alphaq", "--alphaq-bits", "2;4"], 2, "widths can't be read"),
        (["plan", "--bits", "alphaq", "--alphaq-bits", "2,3,4"], 2, "widths of 2, 4, 8"),
        (["plan", "--bits", "alphaq", "--alphaq-block", "1"], 2, "block"),
        (["generate", "nowhere", "hi"], 2, "no such bundle"),
        (["bench", "nowhere"], 2, "no such bundle"),
        (["verify", "nowhere"], 2, "no such bundle"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    process = lfmc(*arguments, cwd=tmp_path)
    assert process.returncode == code, process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert len(process.stderr.splitlines()) <= 24
    assert list(tmp_path.iterdir()) == []


def test_errors_are_also_reported_as_json(tmp_path: Path) -> None:
    process = lfmc("export", "nowhere", "--json", cwd=tmp_path)
    assert json.loads(process.stdout)["exit_code"] == process.returncode == 2


def test_unreachable_workers_are_wrong_input(tmp_path: Path) -> None:
    for address in ("tcp://127.0.0.1:1", "dask://127.0.0.1:9"):
        process = lfmc("plan", "--bits", "uniform", "--workers", address, cwd=tmp_path)
        assert process.returncode == 2, process.stderr
        assert "where" in process.stderr or "expected" in process.stderr


def test_workers_without_dask_name_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['distributed'] = None\n"
        "sys.argv = ['lfmc', 'plan', '--workers', 'dask://127.0.0.1:9']\n"
        "from lfmc.cli import main; main()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 4, process.stderr
    assert "pip install 'lfmc[dask]'" in process.stderr


def test_measurements_are_cached_unless_no_cache_is_set(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint("lfm2_moe")
    first = lfmc("plan", model, "--no-cache", "--json")
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "cache").exists()
    assert lfmc("plan", model, "--json").stdout == first.stdout
    assert (tmp_path / "cache").is_dir()
    assert lfmc("plan", model, "--json").stdout == first.stdout


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        f"sys.argv = ['lfmc', 'export', '--bits', '4', '--check', 'off', '--output', "
        f"{str(tmp_path / 'b')!r}]\n"
        "from lfmc.cli import main; main()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 4, process.stderr
    assert "pip install 'lfmc[onnx]'" in process.stderr
    assert list(tmp_path.iterdir()) == []
