"""The examples run as a user runs them, and leave nothing running."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())


def run(script: str, cwd: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script)],
        cwd=cwd,
        env={**os.environ, "MARK_OF_THE_TEST": str(cwd)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def still_running(cwd: Path, *, within_s: float) -> list[str]:
    """The commands of the processes that `run` started, however indirectly, and that don't end within the time."""
    mark = f"MARK_OF_THE_TEST={cwd}".encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_text().replace("\0", " ")
                handle = os.pidfd_open(int(process.name))
                ended, _, _ = select.select([handle], [], [], within_s)
                os.close(handle)
                if not ended:
                    found.append(command)
        except OSError:
            pass  # it ended meanwhile, or is another user's
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_and_leaves_no_process(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path)
    assert still_running(tmp_path, within_s=5) == []


def test_the_quickstart_tells_what_happened_where(tmp_path: Path) -> None:
    text = run("quickstart.py", tmp_path)
    for word in (
        "s3://flowfn-quickstart/digits",
        "/data (read-only) has digits.csv.gz",
        "/models (writable)",
        "/models/best.npz",
        "accuracy",
        "staged",
    ):
        assert word in text
    recognised, written = (
        line.split(":")[1].split() for line in text.splitlines() if line.startswith(("   recog", "   writ"))
    )
    assert sum(a == b for a, b in zip(recognised, written, strict=True)) >= 9
