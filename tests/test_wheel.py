"""The wheel, installed into an empty environment, exports the demo checkpoint."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_wheel_exports_the_demo(tmp_path: Path) -> None:
    source = tmp_path / "source"
    copy_tracked(source)
    dist = tmp_path / "dist"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(dist.glob("lfmc-*.whl"))
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    # Dependencies come from this environment; lfmc itself must come from the wheel.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = venv / "bin" / "python"
    run = [python, "-m", "lfmc", "export", "--bits", "4", "--check", "fast", "--context", "64"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lfm2-moe-8m-onnx" / "manifest.json").is_file()
    page = [python, "-m", "lfmc", "inspect", "--report", "page.html"]
    subprocess.run(page, cwd=tmp_path, capture_output=True, check=True)
    assert "lfm2-moe-8m" in (tmp_path / "page.html").read_text(encoding="utf-8")
    where = "import lfmc.passes, lfmc.targets, lfmc.calib_free; print(lfmc.passes.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(site) in found.stdout


def copy_tracked(target: Path) -> None:
    """The files that git tracks, as they are now: nothing built, nothing ignored."""
    listed = subprocess.run(
        ["git", "-C", REPO, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((REPO / name).read_bytes())
