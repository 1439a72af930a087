"""mypy --strict and pyright see in a decorated function what the function's author wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def mypy(path: Path, tmp_path: Path) -> dict[int, str]:
    """The lines that mypy refuses, and why."""
    options = ["--strict", "--no-error-summary", "--hide-error-context", "--cache-dir", str(tmp_path / "mypy")]
    command = [sys.executable, "-m", "mypy", *options, "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    lines = re.findall(rf"^[^\n]*{path.name}:(\d+): error: (.*)$", ended.stdout, re.MULTILINE)
    assert bool(lines) == bool(ended.returncode), ended.stdout
    return {int(number): text for number, text in lines}


def pyright(path: Path, tmp_path: Path) -> dict[int, str]:
    """The lines that pyright refuses, and why."""
    config = tmp_path / "pyrightconfig.json"
    # An absolute path in "include" would be ignored.
    settings = {
        "include": [os.path.relpath(path, tmp_path)],
        "extraPaths": [str(ROOT), str(ROOT / "runtime")],
        "typeCheckingMode": "strict",
    }
    config.write_text(json.dumps({**settings, "reportUnusedCallResult": False, "reportUnusedFunction": False}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(config)]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return {
        one["range"]["start"]["line"] + 1: one["message"]
        for one in found["generalDiagnostics"]
        if one["severity"] == "error"
    }


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_the_handle_has_the_functions_types(checker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert checker(HERE / "handle.py", tmp_path) == {}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_misuse_is_refused_where_it_stands(checker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = HERE / "misuse.py"
    refused = {number for number, line in enumerate(path.read_text().splitlines(), 1) if line.endswith("# refused")}
    assert len(refused) >= 10
    assert set(checker(path, tmp_path)) == refused
