"""The example runs a real bundle without torch or lfmc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lfmc

SCRIPT = Path(__file__).parents[2] / "examples" / "onnx" / "run.py"


def test_self_test_and_generation(tmp_path: Path) -> None:
    bundle = lfmc.export(bits="4", output=tmp_path / "b", check="off", context=128)
    self_test = run(str(bundle.path), "--self-test")
    assert self_test.returncode == 0, self_test.stderr
    assert "3 golden prompts" in self_test.stdout
    golden = bundle.read_json("golden.json")[0]
    generation = run(str(bundle.path), golden["text"], "--tokens", "16")
    assert generation.stdout.rstrip("\n") == golden["text"] + golden["continuation"].rstrip("\n")


def test_the_self_test_fails_for_other_tokens(tmp_path: Path) -> None:
    bundle = lfmc.export(bits="4", output=tmp_path / "b", check="off", context=128)
    path = bundle.path / "golden.json"
    first = bundle.read_json("golden.json")[0]["tokens"][0]
    path.write_text(path.read_text().replace(f"{first},", f"{first + 1},", 1))
    assert run(str(bundle.path), "--self-test").returncode == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['lfmc'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
