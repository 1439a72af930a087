"""The commands of a checkout: listed, runnable, and clear about what they lack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE_VENV = ROOT / "scripts" / "make-venv"


def test_make_alone_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make (\S+) ", shown)) == set(phony[1].split())


def test_readme_names_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"^make (\S+)|`make (\S+?)[ `]", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_without_a_python_it_says_what_is_needed(tmp_path: Path) -> None:
    # Whatever /bin/sh and the script itself need, and no Python.
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "cat"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    ended = subprocess.run(
        [MAKE_VENV, tmp_path / "venv"], env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "Python 3.10 or newer" in ended.stderr and "apt-get install python3" in ended.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    ended = subprocess.run([MAKE_VENV, tmp_path / "venv", "/bin/false"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "PYTHON=/bin/false" in ended.stderr


def test_the_environment_is_made_with_the_python_asked_for(tmp_path: Path) -> None:
    subprocess.run([MAKE_VENV, tmp_path / "venv", sys.executable], check=True, capture_output=True)
    program = "import sys; print(*sys.version_info[:3])"
    python = tmp_path / "venv" / "bin" / "python"
    made = subprocess.run([python, "-c", program], env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert made.stdout.split() == [str(part) for part in sys.version_info[:3]]


@pytest.mark.parametrize("script", [ROOT / ".ci" / "run", MAKE_VENV, ROOT / "scripts" / "install"], ids=str)
def test_a_script_is_executable_and_parses(script: Path) -> None:
    assert os.access(script, os.X_OK)
    shell = script.read_text().splitlines()[0].split("/")[-1].split()[-1]
    assert subprocess.run([shell, "-n", script], capture_output=True).returncode == 0


def test_every_test_file_has_a_name_of_its_own() -> None:
    # pytest's default import mode puts each folder on sys.path, so that workers can import the tests' functions.
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
